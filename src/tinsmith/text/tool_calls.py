"""Tool calls that a model writes into its text, in the format of Hermes and Qwen: JSON between
<tool_call> and </tool_call>."""

from __future__ import annotations

import json
from dataclasses import dataclass

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str  # a JSON object


def known_format(template: str | None) -> bool:
    """Whether a chat template asks for calls in this format, rather than in another between the same tags."""
    return (
        template is not None
        and _OPEN in template
        and "<function=" not in template
        and "arg_key" not in template
    )


class ToolCalls:
    """Finds calls in a text that comes in pieces. What cannot be read as a call stays text."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[str | ToolCall]:
        self._held += text
        found: list[str | ToolCall] = []
        while True:
            start = self._held.find(_OPEN)
            if start < 0:
                keep = beginning(self._held, (_OPEN,))
                if len(self._held) > keep:
                    found.append(self._held[: len(self._held) - keep])
                    self._held = self._held[len(self._held) - keep :]
                return found
            end = self._held.find(_CLOSE, start)
            if start:
                found.append(self._held[:start])
                self._held = self._held[start:]
            if end < 0:
                return found
            end += len(_CLOSE) - start
            found.append(_read(self._held[:end]))
            self._held = self._held[end:]

    def rest(self) -> list[str | ToolCall]:
        held, self._held = self._held, ""
        return [held] if held else []


def _read(block: str) -> str | ToolCall:
    try:
        value = json.loads(block[len(_OPEN) : -len(_CLOSE)])
    except (ValueError, RecursionError):
        return block
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return block
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # some models write the object as a text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return block
    if not isinstance(arguments, dict):
        return block
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def beginning(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    most = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), most, -1):
            if text.endswith(mark[:length]):
                most = length
                break
    return most
