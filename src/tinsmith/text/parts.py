"""What an answer consists of: text, thoughts and tool calls, and what it takes to find them in pieces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True, slots=True)
class Thought:
    """More of what a model thinks."""

    text: str


Part = str | Thought | ToolCall
Tools = Mapping[str, Mapping[str, Any]]  # by name, the JSON schemas of a function's parameters by theirs


class Reader(Protocol):
    """Finds the parts of a text that comes in pieces. What cannot be read as a call stays text."""

    def feed(self, text: str) -> list[Part]: ...

    def rest(self) -> list[Part]:
        """What is left at the end."""
        ...


def tools_of(functions: Sequence[Mapping[str, Any]]) -> Tools:
    """The parameters' schemas of OpenAI's function tools."""
    found: dict[str, Mapping[str, Any]] = {}
    for each in functions:
        parameters = each["function"].get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        found[each["function"]["name"]] = properties if isinstance(properties, dict) else {}
    return found


def beginning(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    most = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), most, -1):
            if text.endswith(mark[:length]):
                most = length
                break
    return most


def call_of(name: object, arguments: object) -> ToolCall | None:
    """A call, if it is one: a name and an object, which some models write as a text."""
    if isinstance(arguments, str):
        arguments = parsed(arguments) if arguments.strip() else {}
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        return None


def parsed(text: str) -> object:
    """JSON; None where it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is no JSON")
