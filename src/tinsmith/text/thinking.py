"""What a model thinks before it answers: its text between <think> and </think>, where it begins with that."""

from __future__ import annotations

from .parts import Part, Thought, beginning

_MOST_BLANK = 64  # characters before a thought
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


class Thinking:
    """Parts a text that comes in pieces into thoughts and the answer."""

    def __init__(self, *, begun: bool, tags: tuple[str, str] = TAGS[0]) -> None:
        """`begun`: whether the prompt ends with the opening tag already."""
        self._open, self._close = tags
        self._held = ""
        self._state = "opened" if begun else "start"

    def feed(self, text: str) -> list[Part]:
        self._held += text
        if self._state == "start":
            bare = self._held.lstrip()
            blank = len(self._held) - len(bare)
            if bare.startswith(self._open) and blank <= _MOST_BLANK:
                self._state, self._held = "opened", bare[len(self._open) :]
            elif self._open.startswith(bare) and blank <= _MOST_BLANK:
                return []  # not known yet
            else:
                self._state = "answer"
        if self._state == "opened":  # and the line break behind it
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "thinking"
        found: list[Part] = []
        if self._state == "thinking":
            end = self._held.find(self._close)
            stop = end if end >= 0 else len(self._held) - beginning(self._held, (self._close,))
            if self._held[:stop]:
                found.append(Thought(self._held[:stop]))
            self._held = self._held[stop:]
            if end >= 0:
                self._state, self._held = "gap", self._held[len(self._close) :]
        if self._state == "gap":  # the blank lines behind a thought
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "answer"
        if self._state == "answer" and self._held:
            found.append(self._held)
            self._held = ""
        return found

    def rest(self) -> list[Part]:
        held, self._held = self._held, ""
        if not held:
            return []
        return [Thought(held) if self._state == "thinking" else held]
