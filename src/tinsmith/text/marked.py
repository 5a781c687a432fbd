"""Finding calls in a text that comes in pieces, by the marks around them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from .parts import Part, ToolCall, beginning, call_of

Read = Callable[[str], list[ToolCall] | None]  # the calls of a block; None where it is none


class Marked:
    """Blocks between marks, each `read` as calls. `frame` are marks around all blocks together, which are no
    text. Without `closes` a block ends where the next one opens, or with the text."""

    def __init__(self, opens: str, closes: str | None, read: Read, frame: tuple[str, ...] = ()) -> None:
        self._opens, self._closes, self._read, self._frame = opens, closes, read, frame
        self._held = ""
        self._inside = False  # a block has been opened; what is held is behind its mark
        self._seen = 0  # of what is held, where no closing mark begins

    def feed(self, text: str) -> list[Part]:
        self._held += text
        found: list[Part] = []
        while True:
            if self._inside:
                closes = self._closes or self._opens
                end = self._held.find(closes, self._seen)
                if end < 0:
                    self._seen = max(0, len(self._held) - len(closes) + 1)
                    return found
                found += self._block(self._held[:end], self._closes or "")
                self._held = self._held[end + len(self._closes or "") :]
                self._inside, self._seen = False, 0
                continue
            start = stop = self._held.find(self._opens)
            if start < 0:
                stop = len(self._held) - beginning(self._held, (self._opens, *self._frame))
            before = self._held[:stop]
            for mark in self._frame:
                before = before.replace(mark, "")
            if before:
                found.append(before)
            if start < 0:
                self._held = self._held[stop:]
                return found
            self._held = self._held[stop + len(self._opens) :]
            self._inside = True

    def rest(self) -> list[Part]:
        held, self._held = self._held, ""
        if not self._inside:
            return [held] if held else []
        self._inside = False
        return self._block(held, "") if self._closes is None else [self._opens + held]

    def _block(self, block: str, closes: str) -> list[Part]:
        calls = self._read(block)
        return [*calls] if calls else [self._opens + block + closes]


class Whole:
    """An answer that is nothing but calls, as JSON objects; any other is text from its first letter on."""

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
        text, at = held.strip().removeprefix(_PYTHON).strip(), 0
        decoder = json.JSONDecoder()
        try:
            while at < len(text):
                value, end = decoder.raw_decode(text, at)
                call = _of_object(value)
                if call is None:
                    break
                found.append(call)
                at = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]
        except (ValueError, RecursionError):
            pass
        if at < len(text) or not found:
            return [held] if held else []
        return found


_PYTHON = "<|python_tag|>"
_BETWEEN = re.compile(r"[ \n;,]*")


def _of_object(value: object) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    if "parameters" in value:
        return call_of(value.get("name"), value["parameters"])
    return call_of(value.get("name"), value.get("arguments", {}))
