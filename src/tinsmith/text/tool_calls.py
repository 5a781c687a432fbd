"""Tool calls that a model writes into its text, in the formats that chat templates ask for.

- Hermes, Qwen: JSON between <tool_call> and </tool_call>
- Llama 3: the whole answer is JSON with `name` and `parameters`
- DeepSeek V3 and R1: a name and JSON in a fence between marks of their own; V3.1: without the fence
- Kimi K2: functions.NAME:NUMBER and JSON
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str  # a JSON object


Part = str | ToolCall


class ToolCalls(Protocol):
    """Finds calls in a text that comes in pieces. What cannot be read as a call stays text."""

    def feed(self, text: str) -> list[Part]: ...

    def rest(self) -> list[Part]:
        """What is left at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """How a model's calls look. `special`: its marks are special tokens, which have to be in the text."""

    parser: Callable[[], ToolCalls]
    special: bool


class Marked:
    """Calls between marks, `read` from what is between them. `frame` are marks around all calls together,
    which are no text."""

    def __init__(
        self, opens: str, closes: str, read: Callable[[str], ToolCall | None], frame: tuple[str, ...] = ()
    ) -> None:
        self._opens, self._closes, self._read, self._frame = opens, closes, read, frame
        self._held = ""

    def feed(self, text: str) -> list[Part]:
        self._held += text
        found: list[Part] = []
        while True:
            for mark in self._frame:
                self._held = self._held.replace(mark, "")
            start = self._held.find(self._opens)
            if start < 0:
                keep = beginning(self._held, (self._opens, *self._frame))
                if len(self._held) > keep:
                    found.append(self._held[: len(self._held) - keep])
                    self._held = self._held[len(self._held) - keep :]
                return found
            end = self._held.find(self._closes, start)
            if start:
                found.append(self._held[:start])
                self._held = self._held[start:]
            if end < 0:
                return found
            end -= start
            whole = end + len(self._closes)
            found.append(self._read(self._held[len(self._opens) : end]) or self._held[:whole])
            self._held = self._held[whole:]

    def rest(self) -> list[Part]:
        held, self._held = self._held, ""
        return [held] if held else []


class Whole:
    """An answer that is nothing but calls; any other one is text from its first letter on."""

    def __init__(self) -> None:
        self._held = ""
        self._is_text = False

    def feed(self, text: str) -> list[Part]:
        self._held += text
        begun = self._held.lstrip().removeprefix(_PYTHON).lstrip()
        if not self._is_text and (not begun or begun.startswith("{") or _PYTHON.startswith(begun)):
            return []
        self._is_text = True
        held, self._held = self._held, ""
        return [held] if held else []

    def rest(self) -> list[Part]:
        held, self._held = self._held, ""
        found: list[Part] = []
        left = held.strip().removeprefix(_PYTHON).strip()
        try:
            while left:
                value, end = json.JSONDecoder().raw_decode(left)
                call = _call(value, "parameters") or _call(value, "arguments")
                if call is None:
                    break
                found.append(call)
                left = left[end:].lstrip(" \n;,")
        except (ValueError, RecursionError):
            pass
        if left or not found:
            return [held] if held else []
        return found


_PYTHON = "<|python_tag|>"


def _call(value: object, field: str) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    if field != "arguments" and field not in value:
        return None
    return _with(value["name"], value.get(field, {}))


def _with(name: str, arguments: object) -> ToolCall | None:
    if isinstance(arguments, str):  # some models write the object as a text
        arguments = _json(arguments)
    if not name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _hermes(block: str) -> ToolCall | None:
    return _call(_json(block), "arguments")


_FENCED = re.compile(r"\s*```json\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def _deepseek(block: str) -> ToolCall | None:
    first, mark, rest = block.partition(_SEPARATOR)
    if not mark:
        return None
    if first.strip() != "function":
        return _with(first.strip(), rest)
    name, _, body = rest.partition("\n")
    fenced = _FENCED.fullmatch(body)
    return _with(name.strip(), fenced[1]) if fenced else None


def _kimi(block: str) -> ToolCall | None:
    head, _, arguments = block.partition("<|tool_call_argument_begin|>")
    named = re.fullmatch(r"\s*functions\.(.+):\d+\s*", head)
    return _with(named[1], arguments) if named else None


_SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"
_DEEPSEEK = ("<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>")
_DEEPSEEK_FRAME = ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>")
_KIMI = ("<|tool_call_begin|>", "<|tool_call_end|>")
_KIMI_FRAME = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")


def format_of(template: str | None) -> Format | None:
    """The format that a chat template asks for calls in; None where it is none of these."""
    if template is None:
        return None
    if _DEEPSEEK[0] in template:
        return Format(lambda: Marked(*_DEEPSEEK, _deepseek, _DEEPSEEK_FRAME), special=True)
    if _KIMI[0] in template:
        return Format(lambda: Marked(*_KIMI, _kimi, _KIMI_FRAME), special=True)
    if "<tool_call>" in template:  # others write something else between the same marks
        other = "<function=" in template or "arg_key" in template
        return (
            None if other else Format(lambda: Marked("<tool_call>", "</tool_call>", _hermes), special=False)
        )
    if '"parameters":' in template and "<|start_header_id|>" in template:
        return Format(Whole, special=False)
    return None


def beginning(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    most = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), most, -1):
            if text.endswith(mark[:length]):
                most = length
                break
    return most
