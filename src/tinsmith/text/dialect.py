"""What a model's chat template says about how it writes: thoughts, tool calls, and what can be set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import jinja2.meta

from . import harmony
from .messages import Message
from .parts import Part, Reader, Thought, ToolCall, Tools
from .thinking import TAGS, Thinking
from .tool_calls import Format, format_of

_PIECE = 4096  # characters
_SWITCHES = ("enable_thinking", "thinking")  # how templates call what turns thoughts on and off


@dataclass(frozen=True, slots=True)
class Dialect:
    """`variables` are those that the template looks at; `tags` are around thoughts, if it knows any."""

    format: Format | None
    tags: tuple[str, str] | None
    variables: frozenset[str]

    @classmethod
    def of(cls, template: str | None) -> Dialect:
        found = template or ""
        tags = next((tags for tags in TAGS if tags[0] in found or tags[1] in found), None)
        return cls(format_of(template), tags, _variables(found))

    @property
    def thinks(self) -> bool:
        return self.tags is not None or (self.format is not None and self.format.thoughts)

    @property
    def efforts(self) -> tuple[str, ...] | None:
        """How much thought can be asked for, where only some words are known."""
        return harmony.EFFORTS if self.format is not None and self.format.thoughts else None

    @property
    def switch(self) -> str | None:
        """The variable by which thoughts are turned on and off."""
        return next((name for name in _SWITCHES if name in self.variables), None)

    def arrange(self, messages: Sequence[Message]) -> list[Message]:
        """A conversation as the template writes it rightly. Raises MessageError."""
        return list(messages) if self.format is None else self.format.arrange(messages)

    def marks(self, *, tools: bool) -> tuple[str, ...] | None:
        """The special tokens that a reader needs in the text. None for all: what nothing here reads is for
        whoever asked."""
        if tools and self.format is None:
            return None
        read = self.format is not None and (tools or self.format.thoughts)
        return (*(self.tags or ()), *(self.format.marks if self.format is not None and read else ()))

    def reader(
        self, tail: str, tools: Tools | None, *, thoughts: bool = True, parallel: bool = True
    ) -> Reader:
        """For an answer to a prompt that ends with `tail`. Without `tools` there are no calls; without
        `thoughts` these are text as the model writes it; without `parallel` an answer ends with its first
        call."""
        read = self.format is not None and (tools is not None or self.format.thoughts)
        calls = self.format.reader(tools or {}) if self.format is not None and read else None
        begun = self.tags is not None and tail.rstrip().endswith(self.tags[0])
        thinking = Thinking(begun=begun, tags=self.tags) if self.tags is not None and thoughts else None
        return _Answer(thinking, calls, tools=tools is not None, thoughts=thoughts, parallel=parallel)


class _Answer:
    """Thoughts first, calls in what is behind them. Blanks before a call and between calls are no text."""

    def __init__(
        self, thinking: Thinking | None, calls: Reader | None, *, tools: bool, thoughts: bool, parallel: bool
    ) -> None:
        self._thinking, self._calls = thinking, calls
        self._tools, self._thoughts, self._parallel = tools, thoughts, parallel
        self._blank = ""  # held back: a call may follow
        self._called = False

    def feed(self, text: str) -> list[Part]:
        # A whole answer in pieces, too: readers cut what they have read from what they hold.
        found: list[Part] = []
        for at in range(0, len(text), _PIECE):
            piece = text[at : at + _PIECE]
            parts = [piece] if self._thinking is None else self._thinking.feed(piece)
            found += self._sort(self._behind(parts))
        return found

    def rest(self) -> list[Part]:
        parts = self._behind([] if self._thinking is None else self._thinking.rest())
        parts = self._sort([*parts, *(self._calls.rest() if self._calls is not None else ())])
        if self._blank and not self._called:
            parts.append(self._blank)
        self._blank = ""
        return parts

    def _behind(self, parts: Sequence[Part]) -> list[Part]:
        found: list[Part] = []
        for part in parts:
            found += self._calls.feed(part) if self._calls is not None and isinstance(part, str) else [part]
        return found

    def _sort(self, parts: Sequence[Part]) -> list[Part]:
        if self._calls is None:
            return [part for part in parts if part]
        found: list[Part] = []
        for part in parts:
            if self._called and not self._parallel:
                break
            if isinstance(part, Thought) and not self._thoughts:
                part = part.text
            if isinstance(part, ToolCall) and not self._tools:
                part = part.arguments  # of what was not offered
            if isinstance(part, ToolCall):
                self._called, self._blank = True, ""
            if isinstance(part, str):
                whole = self._blank + part
                part = whole.rstrip()
                self._blank = whole[len(part) :]
            if part:
                found.append(part)
        return found


def _variables(template: str) -> frozenset[str]:
    """What a template looks at that it has not set itself."""
    bare = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)  # transformers' own, for training
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(bare)
        return frozenset(jinja2.meta.find_undeclared_variables(tree))
    except (jinja2.TemplateError, RecursionError):
        return frozenset()  # it can write nothing either, and says so then
