"""Chats as both doors have them: messages for the template, the images among them, and a prompt of both."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tinsmith.service.completions import Prompt, Target
from tinsmith.text.parts import Reader, tools_of
from tinsmith.text.tokenizer import TextError
from tinsmith.wire.errors import WireError
from tinsmith.wire.fields import Fields
from tinsmith.wire.images import ImageChunk

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_FORMATS = {"image/png": "png", "image/jpeg": "jpeg", "image/jpg": "jpeg"}
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of a message, undecoded, and what it is called in errors."""

    where: str
    data: bytes
    format: str


@dataclass(slots=True)
class Chat:
    """Messages as chat templates take them, the tools that are offered, what the template is told beside, and
    the images in the order of the messages. `thinking` turns thoughts on or off; `effort` is how much of them
    there shall be, with the name of its field."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    thinking: bool | None = None
    adaptive: bool = False  # whether the model may decide about it, as one does that knows no thoughts
    effort: tuple[str, str] | None = None

    def add(self, message: dict[str, Any]) -> None:
        """A message; one of the role that has just spoken goes on with its turn."""
        last: dict[str, Any] = self.messages[-1] if self.messages else {"role": ""}
        goes_on = last["role"] == message["role"] and "tool_calls" not in last
        if not goes_on or message["role"] == "tool":
            self.messages.append(message)
            return
        before, more = last["content"], message.pop("content")
        if isinstance(before, str) and isinstance(more, str):
            last["content"] = "\n".join(text for text in (before, more) if text)
        else:
            last["content"] = [*_parts(before), *_parts(more)]
        if "reasoning_content" in last and "reasoning_content" in message:
            message["reasoning_content"] = last["reasoning_content"] + "\n" + message["reasoning_content"]
        last.update(message)

    def content(self, parts: Sequence[str | Picture]) -> str | list[dict[str, str]]:
        """What a message says: its texts, joined by line breaks, and its images between them."""
        found: list[dict[str, str]] = []
        for part in parts:
            if isinstance(part, Picture):
                self.pictures.append(part)
                found.append({"type": "image"})
            elif found and found[-1]["type"] == "text":
                found[-1]["text"] += "\n" + part
            else:
                found.append({"type": "text", "text": part})
        if all(part["type"] == "text" for part in found):
            return found[0]["text"] if found else ""
        return found

    def reader(self, target: Target, prompt: Prompt, **how: bool) -> Reader:
        """What finds thoughts and calls in an answer."""
        tail = target.tokenizer.decode(prompt.tokens[-8:], marks=None)
        return target.tokenizer.dialect.reader(tail, tools_of(self.tools) if self.tools else None, **how)

    async def prompt(self, target: Target, *, go_on: bool = False) -> Prompt:
        """The chat by the model's template, which has to know what it is told. Raises WireError."""
        tokenizer, model = target.tokenizer, target.model
        if self.pictures and not model.images:
            why = model.no_images or "it reads text alone"
            raise WireError(self.pictures[0].where, f"is an image, which {model.name} does not take: {why}")
        if tokenizer.template is not None:
            if self.tools and not tokenizer.knows("tools"):
                raise _unknown("tools", target)
            for name in self.options:
                if not tokenizer.knows(name):
                    raise _unknown(name, target)
        options = {**self.options, **self._thoughts(target)}
        try:
            write = partial(tokenizer.chat, self.messages, self.tools, options, go_on=go_on)
            ids = await asyncio.to_thread(write)
        except TextError as error:
            raise WireError("messages", str(error)) from None
        return self._with_pictures(model.image_token, ids)

    def _thoughts(self, target: Target) -> dict[str, Any]:
        """What the template is told about them."""
        dialect = target.tokenizer.dialect
        options: dict[str, Any] = {}
        if self.thinking is not None and dialect.switch is not None:
            options[dialect.switch] = self.thinking
        elif self.thinking and not self.adaptive and not dialect.thinks:
            raise _unknown("thinking", target)
        if self.effort is not None:
            name, effort = self.effort
            if effort == "none" and dialect.switch is not None:
                options[dialect.switch] = False
            elif "reasoning_effort" not in dialect.variables:
                raise _unknown(name, target)
            elif dialect.efforts is not None and effort not in dialect.efforts:
                raise WireError(name, f"must be one of {', '.join(dialect.efforts)} for {target.model.name}")
            else:
                options["reasoning_effort"] = effort
        return options

    def _with_pictures(self, token: int | None, ids: list[int]) -> Prompt:
        """The template wrote a token in each image's place, which the image itself takes."""
        if token is None:
            return Prompt(ids)
        places = [at for at, id_ in enumerate(ids) if id_ == token]
        if len(places) != len(self.pictures):
            raise WireError(
                "messages",
                f"have {len(self.pictures)} images, but are written with {len(places)} places for them: a"
                " text must not hold the model's image token, and the template must know images there",
            )
        images = tuple(
            ImageChunk(number, at - number, picture.data, picture.format)
            for number, (at, picture) in enumerate(zip(places, self.pictures, strict=True))
        )
        return Prompt(
            [id_ for id_ in ids if id_ != token], images, tuple(picture.where for picture in self.pictures)
        )


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _unknown(name: str, target: Target) -> WireError:
    return WireError(name, f"is not known to the chat template of {target.model.name}; leave it out")


def read_picture(where: Fields, name: str, media_type: str, data: str) -> Picture:
    """An image of the field `name`, whose bytes are given in base64."""
    if media_type not in _FORMATS:
        raise where.error(name, f"has the type {media_type[:40]!r}; send image/png or image/jpeg")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise where.error(name, "is no base64") from None
    if not raw:
        raise where.error(name, "has no bytes")
    return Picture(f"{where.where}.{name}", raw, _FORMATS[media_type])


def read_data_url(where: Fields, name: str) -> Picture:
    """An image as a data: URL. Others are refused: this server fetches nothing."""
    url = where.raw(name)
    if not isinstance(url, str) or not url:
        raise where.error(name, "must be a data: URL")
    head, comma, data = url.partition(",")
    found = re.fullmatch(r"data:([\w./+-]*)((?:;[\w.=+-]*)*)", head, re.IGNORECASE)
    if not comma or found is None or not found[2].lower().endswith(";base64"):
        raise where.error(
            name, "is not fetched by this server; send the image itself: data:image/png;base64,..."
        )
    return read_picture(where, name, found[1].lower(), data)


def read_name(tool: Fields, name: str, known: Sequence[dict[str, Any]]) -> str:
    """A tool's name, which no other one has."""
    text = tool.text(name)
    if not _NAME.fullmatch(text):
        raise tool.error(name, "must be of 1 to 128 letters, digits, underscores, dots and dashes")
    if any(each["function"]["name"] == text for each in known):
        raise tool.error(name, f"{text!r} is the name of another tool, too")
    return text


def read_effort(fields: Fields, name: str) -> tuple[str, str] | None:
    effort = fields.optional_text(name)
    if effort is None:
        return None
    if effort not in EFFORTS:
        raise fields.error(name, f"must be one of {', '.join(EFFORTS)}")
    return (f"{fields.where}.{name}" if fields.where else name), effort
