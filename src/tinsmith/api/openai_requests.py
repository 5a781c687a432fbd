"""Reading OpenAI's requests. What cannot be honoured is refused by name."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from typing import Any, cast

from tinsmith.service.completions import Prompt, Target, Wanted
from tinsmith.text.tokenizer import TextError
from tinsmith.wire.errors import WireError
from tinsmith.wire.fields import Fields
from tinsmith.wire.sample_request import MOST_SAMPLES

from .conversations import Chat, Picture, read_data_url, read_effort, read_name
from .doors import read_stops, read_top_p, refuse_unknown, refuse_unless

_INT32 = 2**31 - 1
_MOST_LIKELIEST = 20
# Fields that say who asks, and change nothing about an answer in OpenAI's own service either.
_LABELS = {"user", "safety_identifier", "prompt_cache_key", "metadata"}
_SAMPLING = {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "stream"}
_SAMPLING |= {"stream_options", "logprobs", "frequency_penalty", "presence_penalty", "logit_bias"} | _LABELS


@dataclass(frozen=True, slots=True)
class _Request:
    """What both kinds of request have."""

    model: str
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    n: int
    stream: bool
    include_usage: bool
    logprobs: int | None

    def _wanted(self, prompts: list[Prompt], max_tokens: int | None, prompt_logprobs: bool) -> Wanted:
        return Wanted(
            prompts=prompts,
            n=self.n,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stop,
            logprobs=self.logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def _read(fields: Fields, max_tokens: int | None, logprobs: int | None) -> dict[str, Any]:
    for name in ("frequency_penalty", "presence_penalty"):
        refuse_unless(fields, name, 0)
    refuse_unless(fields, "logit_bias", {})
    _check_labels(fields)
    stream = fields.flag("stream", False)
    options = fields.optional_child("stream_options")
    if options is not None:
        if not stream:
            raise fields.error("stream_options", "goes with stream; set that too")
        refuse_unknown(options, {"include_usage", "include_obfuscation"}, "stream_options")
        refuse_unless(options, "include_obfuscation", False)
    top_k = fields.optional_integer("top_k", least=-1, most=_INT32)
    return {
        "model": fields.text("model", longest=4096),
        "max_tokens": max_tokens,
        "temperature": fields.number("temperature", 1.0, least=0.0),
        "top_p": read_top_p(fields),
        "top_k": -1 if top_k is None else top_k,
        "seed": fields.optional_integer("seed", most=2**64 - 1),
        "stop": read_stops(fields, "stop"),
        "n": fields.optional_integer("n", least=1, most=MOST_SAMPLES) or 1,
        "stream": stream,
        "include_usage": options is not None and options.flag("include_usage", False),
        "logprobs": logprobs,
    }


def _check_labels(fields: Fields) -> None:
    for name in _LABELS - {"metadata"}:
        fields.optional_text(name)
    fields.text_metadata("metadata")


@dataclass(frozen=True, slots=True)
class CompletionRequest(_Request):
    prompts: list[str | list[int]]
    echo: bool

    @property
    def only_prompt(self) -> bool:
        """Whether only the prompt's own logprobs are wanted."""
        return self.max_tokens == 0

    @classmethod
    def read(cls, fields: Fields) -> CompletionRequest:
        refuse_unknown(fields, _SAMPLING | {"prompt", "echo", "best_of", "suffix"}, "/completions")
        refuse_unless(fields, "suffix", "")
        refuse_unless(fields, "best_of", fields.raw("n") or 1)
        max_tokens = fields.optional_integer("max_tokens", least=0, most=_INT32)
        echo = fields.flag("echo", False)
        logprobs = fields.optional_integer("logprobs", least=0, most=_MOST_LIKELIEST)
        request = cls(
            **_read(fields, 16 if max_tokens is None else max_tokens, logprobs),
            prompts=_read_prompts(fields),
            echo=echo,
        )
        if request.only_prompt and (not echo or request.stream):
            raise fields.error("max_tokens", "must be at least 1, or 0 with echo and without stream")
        if request.stream and echo and logprobs is not None:
            raise fields.error(
                "echo",
                "with logprobs is not offered with stream: a prompt's come with the end; leave one out",
            )
        if len(request.prompts) * request.n > MOST_SAMPLES:
            raise fields.error("n", f"times the prompts is more than {MOST_SAMPLES}; ask for fewer at once")
        return request

    async def wanted(self, target: Target) -> Wanted:
        prompts: list[Prompt] = []
        for place, prompt in enumerate(self.prompts):
            where = "prompt" if len(self.prompts) == 1 else f"prompt[{place}]"
            ids = await _encode(target, prompt, where) if isinstance(prompt, str) else prompt
            if not ids:
                raise WireError(where, "has no tokens; it must have at least one")
            if (worst := max(ids)) >= target.model.vocab_size:
                raise WireError(
                    where,
                    f"has token {worst}; {target.model.name} has ids 0 to {target.model.vocab_size - 1}",
                )
            prompts.append(Prompt(ids))
        return self._wanted(prompts, self.max_tokens or 1, self.echo and self.logprobs is not None)


async def _encode(target: Target, text: str, where: str) -> list[int]:
    try:
        return await asyncio.to_thread(target.tokenizer.encode, text)
    except TextError as error:
        raise WireError(where, str(error)) from None


def _read_prompts(fields: Fields) -> list[str | list[int]]:
    prompt = fields.raw("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt and len(prompt) <= _INT32:
        if all(isinstance(item, str) for item in prompt):
            return cast(list[str | list[int]], prompt)
        if _are_ids(prompt):
            return [cast(list[int], prompt)]
        if all(isinstance(item, list) and _are_ids(item) for item in prompt):
            return cast(list[str | list[int]], prompt)
    raise fields.error(
        "prompt", "must be a text, a list of texts, a list of token ids, or a list of lists of token ids"
    )


def _are_ids(values: list[Any]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= _INT32 for v in values)


_CHAT = {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
_CHAT |= {"response_format", "modalities", "reasoning_effort", "service_tier", "store", "verbosity"}
_CHAT |= {"prompt_cache_retention", "chat_template_kwargs", "separate_reasoning"}
_RESERVED = {"tools", "messages", "chat_template", "tokenize", "return_dict", "return_tensors", "documents"}
_RESERVED |= {"add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length"}


@dataclass(frozen=True, slots=True)
class ChatRequest(_Request):
    chat: Chat
    parallel: bool  # whether an answer may call more than one tool
    thoughts: bool  # whether they are told apart

    @classmethod
    def read(cls, fields: Fields) -> ChatRequest:
        refuse_unknown(fields, _SAMPLING | _CHAT, "/chat/completions")
        refuse_unless(fields, "response_format", {"type": "text"})
        refuse_unless(fields, "modalities", ["text"])
        refuse_unless(fields, "service_tier", "auto", "default")
        refuse_unless(fields, "store", False)
        refuse_unless(fields, "verbosity", "medium")
        refuse_unless(fields, "prompt_cache_retention", "in_memory")
        refuse_unless(fields, "tool_choice", "auto", "none")
        limits = [
            fields.optional_integer(name, least=1, most=_INT32)
            for name in ("max_completion_tokens", "max_tokens")
        ]
        shown = fields.flag("logprobs", False)
        top = fields.optional_integer("top_logprobs", least=0, most=_MOST_LIKELIEST)
        if top is not None and not shown:
            raise fields.error("top_logprobs", "goes with logprobs; set that too")
        options = dict((fields.optional_child("chat_template_kwargs") or Fields({})).values())
        for name in options:
            if name in _RESERVED:
                raise fields.error(f"chat_template_kwargs.{name}", "is not for requests to set; leave it out")
        chat = Chat(options=options, effort=read_effort(fields, "reasoning_effort"))
        tools = read_tools(fields) if fields.has("tools") else []
        if fields.raw("tool_choice") != "none":
            chat.tools = tools
        read_messages(fields, chat)
        return cls(
            **_read(fields, limits[0] if limits[0] is not None else limits[1], (top or 0) if shown else None),
            chat=chat,
            parallel=fields.flag("parallel_tool_calls", True),
            thoughts=fields.flag("separate_reasoning", True),
        )

    async def wanted(self, target: Target) -> Wanted:
        prompt = await self.chat.prompt(target)
        marks = target.tokenizer.dialect.marks(tools=bool(self.chat.tools))
        return replace(self._wanted([prompt], self.max_tokens, False), marks=marks)


def read_tools(fields: Fields) -> list[dict[str, Any]]:
    tools: list[dict[str, Any]] = []
    for place, item in enumerate(fields.array("tools")):
        tool = Fields(item, f"tools[{place}]")
        if tool.text("type") != "function":
            raise tool.error("type", "must be 'function'")
        refuse_unknown(tool, {"type", "function"}, "tools")
        function = tool.child("function")
        refuse_unknown(function, {"name", "description", "parameters", "strict"}, "functions")
        read_name(function, "name", tools)
        function.optional_child("parameters")
        description = function.raw("description")
        if description is not None and not isinstance(description, str):
            raise function.error("description", "must be a text")
        refuse_unless(function, "strict", False)
        said = {name: value for name, value in function.values().items() if value is not None}
        tools.append({"type": "function", "function": said})
    return tools


_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(fields: Fields, chat: Chat) -> None:
    for place, item in enumerate(fields.array("messages")):
        chat.messages.append(_read_message(Fields(item, f"messages[{place}]"), chat))
    if not chat.messages:
        raise fields.error("messages", "must have at least one message")


def _read_message(message: Fields, chat: Chat) -> dict[str, Any]:
    role = message.text("role")
    if role not in _ROLES:
        raise message.error("role", f"must be one of {', '.join(_ROLES)}")
    known = {"role", "content", "name"}
    known |= {"tool_calls", "reasoning_content", "refusal", "annotations"} if role == "assistant" else set()
    known |= {"tool_call_id"} if role == "tool" else set()
    refuse_unknown(message, known, "messages of that role")
    refuse_unless(message, "annotations", [])
    refuse_unless(message, "refusal")
    found: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls: list[dict[str, Any]] = []
    for i, item in enumerate(message.array("tool_calls") if message.has("tool_calls") else ()):
        calls.append(_read_call(Fields(item, f"{message.where}.tool_calls[{i}]")))
    if calls:
        found["tool_calls"] = calls
    content = message.raw("content")
    if content is None and role == "assistant" and (calls or message.has("reasoning_content")):
        content = ""
    found["content"] = _read_content(message, content, chat, images=role in ("user", "tool"))
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (text := message.raw(name)) is not None:
            if not isinstance(text, str):
                raise message.error(name, "must be a text")
            found[name] = text
    if role == "tool":
        message.text("tool_call_id")
    return found


def _read_content(
    message: Fields, content: object, chat: Chat, *, images: bool
) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise message.error("content", "must be a text or a list of parts")
    parts: list[str | Picture] = []
    for place, item in enumerate(content):
        part = Fields(item, f"{message.where}.content[{place}]")
        kind = part.raw("type")
        if kind == "image_url" and images:
            refuse_unknown(part, {"type", "image_url"}, "parts")
            image = part.child("image_url")
            refuse_unknown(image, {"url", "detail"}, "images")
            refuse_unless(image, "detail", "auto")
            parts.append(read_data_url(image, "url"))
            continue
        if kind != "text":
            offered = "'text' or 'image_url'" if images else "'text'"
            raise part.error("type", f"{str(kind)[:40]!r} is not offered by this server here; use {offered}")
        refuse_unknown(part, {"type", "text"}, "parts")
        text = part.raw("text")
        if not isinstance(text, str):
            raise part.error("text", "must be a text")
        parts.append(text)
    return chat.content(parts)


def _read_call(call: Fields) -> dict[str, Any]:
    if call.raw("type") not in (None, "function"):
        raise call.error("type", "must be 'function'")
    function = call.child("function")
    raw = function.raw("arguments")
    try:  # templates write the object, not its text
        arguments = json.loads(raw) if isinstance(raw, str) and raw.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise function.error("arguments", "must be a JSON object as a text")
    found = {"type": "function", "function": {"name": function.text("name"), "arguments": arguments}}
    return {"id": call.text("id"), **found}
