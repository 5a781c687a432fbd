"""Conversations as chat templates take them: OpenAI's messages, whose calls have objects as arguments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


class MessageError(ValueError):
    """Why a conversation cannot be written; the text goes on behind the name of the messages."""


def ids_of_kimi(messages: Sequence[Message]) -> list[Message]:
    """Kimi's calls are known by their ids, functions.NAME:NUMBER, which the template writes for them."""
    number = 0

    def name(call: Message) -> str:
        nonlocal number
        number += 1
        return f"functions.{call['function']['name']}:{number - 1}"

    return _with_ids(messages, name)


def ids_of_mistral(messages: Sequence[Message]) -> list[Message]:
    """Mistral's templates want ids of nine letters and digits."""
    return _with_ids(messages, lambda call: hashlib.sha256(call["id"].encode()).hexdigest()[:9])


def _with_ids(messages: Sequence[Message], name: Callable[[Message], str]) -> list[Message]:
    """Calls under other ids, and the results that answer them. Raises MessageError."""
    known: dict[str, str] = {}
    found: list[Message] = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [{**call, "id": name(call)} for call in message["tool_calls"]]
            known.update(
                (old["id"], new["id"]) for old, new in zip(message["tool_calls"], calls, strict=True)
            )
            message = {**message, "tool_calls": calls}
        if message["role"] == "tool":
            if message["tool_call_id"] not in known:
                raise MessageError(f"the result of {message['tool_call_id']!r} belongs to no call before it")
            message = {**message, "tool_call_id": known[message["tool_call_id"]]}
        found.append(message)
    return found


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Calls' arguments as JSON texts: some templates (DeepSeek's) put them together with other text."""
    return [
        {**message, "tool_calls": [_texted(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _texted(call: Message) -> Message:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
