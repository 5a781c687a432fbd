"""GPT-OSS's harmony: an answer is messages of their own, each with a header that says where it goes.

    <|channel|>analysis<|message|>a thought<|end|>
    <|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>
    <|start|>assistant<|channel|>final<|message|>the answer<|return|>

What is in the channel analysis are thoughts, what has a recipient is a call, all else is text. The prompt
ends with <|start|>assistant, so that the first header has no beginning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .messages import Message, MessageError
from .parts import Part, Thought, beginning, call_of

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)
EFFORTS = ("low", "medium", "high")
_HEADS = (_START, _CHANNEL, _CONSTRAIN, _MESSAGE, "to=")
_LONGEST_HEADER = 512


class Harmony:
    def __init__(self) -> None:
        self._held = ""
        self._body = False  # whether what is held is a message's, or else its header's
        self._seen = 0  # of a body, where no mark begins
        self._channel, self._recipient = "", ""
        self._given: type | None = None  # the kind of the last part, and whether its message has ended
        self._ended = False

    def feed(self, text: str) -> list[Part]:
        self._held += text
        found: list[Part] = []
        while self._read_body(found) if self._body else self._read_header():
            pass
        return found

    def rest(self) -> list[Part]:
        found: list[Part] = []
        if self._body:
            self._close(self._held, found)
        self._held, self._body = "", False
        return found

    def _read_header(self) -> bool:
        """Whether a body has begun."""
        bare = self._held.lstrip()
        if len(self._held) < _LONGEST_HEADER and any(head.startswith(bare) for head in _HEADS):
            return False  # not known yet
        end = self._held.find(_MESSAGE, 0, _LONGEST_HEADER)
        head = next((head for head in _HEADS if bare.startswith(head)), "")
        if not head or (end < 0 and len(self._held) >= _LONGEST_HEADER):
            # A text without a header, as a model that was tuned may write.
            self._channel, self._recipient, self._body = "final", "", True
            self._held = bare[len(head) :] if head else self._held
            return True
        if end < 0:
            return False
        header, self._held = self._held[:end], self._held[end + len(_MESSAGE) :]
        channel = re.search(r"<\|channel\|>\s*(\w+)", header)
        recipient = re.search(r"\bto=([^\s<]+)", header)
        self._channel = channel[1] if channel else "final"
        self._recipient = recipient[1].removeprefix("functions.") if recipient else ""
        self._body = True
        return True

    def _read_body(self, found: list[Part]) -> bool:
        """Whether the message has ended."""
        marks = (*_ENDS, _START, _CHANNEL)  # the last two where a model forgets to end one
        ends = [(at, mark) for mark in marks if (at := self._held.find(mark, self._seen)) >= 0]
        if not ends:
            if self._recipient:
                self._seen = max(0, len(self._held) - max(map(len, marks)) + 1)
            else:
                stop = len(self._held) - beginning(self._held, marks)
                self._give(self._held[:stop], found)
                self._held = self._held[stop:]
            return False
        at, mark = min(ends)
        body, self._held = self._held[:at], self._held[at + (len(mark) if mark in _ENDS else 0) :]
        self._close(body, found)
        self._body, self._seen = False, 0
        return True

    def _close(self, body: str, found: list[Part]) -> None:
        call = call_of(self._recipient, body) if self._recipient else None
        if call is not None:
            found.append(call)
        else:
            self._give(body, found)
        self._ended = True

    def _give(self, text: str, found: list[Part]) -> None:
        if not text:
            return
        kind = Thought if self._channel == "analysis" else str
        if self._ended and self._given is kind:
            text = "\n" + text  # another message of the same kind
        self._given, self._ended = kind, False
        found.append(Thought(text) if kind is Thought else text)


def arrange(messages: Sequence[Message]) -> list[Message]:
    """The template writes the first call of a message alone, takes a result for that of the newest call, and
    knows thoughts as `thinking`, which it does not take beside a text: so each call becomes a message of its
    own, with its result behind it. Raises MessageError."""
    found: list[Message] = []
    at = 0
    while at < len(messages):
        message = dict(messages[at])
        thought = message.pop("reasoning_content", None)
        calls = message.pop("tool_calls", None) or []
        at += 1
        if not calls:
            found.append({**message, "thinking": thought} if thought else message)
            continue
        if thought and message["content"]:
            thought, message["content"] = f"{thought}\n{message['content']}", ""
        results: dict[str, Message] = {}
        while at < len(messages) and messages[at]["role"] == "tool":
            results[messages[at]["tool_call_id"]] = messages[at]
            at += 1
        for call in calls:
            found.append({**message, "tool_calls": [call], **({"thinking": thought} if thought else {})})
            if (result := results.pop(call["id"], None)) is not None:
                found.append(result)
            thought, message["content"] = None, ""
        if results:
            raise MessageError(f"the result of {next(iter(results))!r} belongs to no call before it")
    return found
