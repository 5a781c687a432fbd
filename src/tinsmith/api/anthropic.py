"""Anthropic's messages: requests in, answers and events out."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from tinsmith.service import errors
from tinsmith.service.completions import Delta, Running
from tinsmith.text.parts import Part, Reader, Thought, ToolCall
from tinsmith.wire.errors import WireError

from .anthropic_requests import MessagesRequest
from .doors import HOSTED, EventStream, all_of, begun, door, dump, guarded, while_there
from .http import Call, json_response

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    410: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def encode_error(status: int, text: str, _field: str | None, error: Exception | None) -> dict[str, object]:
    more = error.reached.fields() if isinstance(error, errors.Limited) else {}
    told = {"type": _TYPES.get(status, "api_error"), "message": text, **more}
    return {"type": "error", "error": told, "detail": text}


async def count_tokens(call: Call) -> Response:
    request = MessagesRequest.read(await call.fields(), count=True)
    target = await call.service.completions.target(call.caller, request.model)
    prompt = await request.prompt(target)
    if prompt.images:
        raise WireError(prompt.places[0], "is an image, whose tokens only sampling counts; leave it out")
    return json_response({"input_tokens": len(prompt.tokens)})


async def messages(call: Call) -> Response:
    request = MessagesRequest.read(await call.fields())
    target = await call.service.completions.target(call.caller, request.model)
    prompt = await request.prompt(target)
    running = await call.service.completions.begin(
        call.caller, target, request.wanted(target, prompt), stream=request.stream
    )
    reader = request.chat.reader(target, prompt, parallel=request.parallel)
    blocks = _Blocks(reader, thoughts=bool(request.chat.thinking))
    message: dict[str, Any] = {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": running.usage.prompt, "output_tokens": 0},
    }
    try:
        if request.stream:
            deltas = await while_there(call.request, begun(running.deltas()))
            events = _events(deltas, running, blocks, message)
            return EventStream(guarded(events, encode_error, lambda body: _event("error", body)), running)
        found = await while_there(call.request, all_of(running.deltas()))
    except BaseException:
        await running.close()
        raise
    content: list[dict[str, Any]] = message["content"]
    for delta in found:
        for part in blocks.feed(delta):
            _append(content, part)
        if delta.finish:
            message["stop_reason"], message["stop_sequence"] = blocks.reason(delta), delta.stop
    message["usage"] = _usage(running)
    return json_response(message)


def _usage(running: Running) -> dict[str, int]:
    return {"input_tokens": running.usage.prompt, "output_tokens": running.usage.completion}


class _Blocks:
    """The parts of an answer; thoughts are among them where they were asked for."""

    def __init__(self, reader: Reader, *, thoughts: bool) -> None:
        self._reader, self._thoughts = reader, thoughts
        self._called = False

    def feed(self, delta: Delta) -> list[Part]:
        parts = [*self._reader.feed(delta.text), *(self._reader.rest() if delta.finish else ())]
        self._called = self._called or any(isinstance(part, ToolCall) for part in parts)
        return [part for part in parts if self._thoughts or not isinstance(part, Thought)]

    def reason(self, delta: Delta) -> str:
        if delta.finish == "length":
            return "max_tokens"
        if delta.stop is not None:
            return "stop_sequence"
        return "tool_use" if self._called else "end_turn"


def _block(part: Part) -> dict[str, Any]:
    if isinstance(part, Thought):
        return {"type": "thinking", "thinking": "", "signature": ""}
    if isinstance(part, ToolCall):
        return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": part.name, "input": {}}
    return {"type": "text", "text": ""}


def _append(content: list[dict[str, Any]], part: Part) -> None:
    block = _block(part)
    if isinstance(part, ToolCall):
        content.append({**block, "input": json.loads(part.arguments)})
        return
    if not content or content[-1]["type"] != block["type"]:
        content.append(block)
    if isinstance(part, Thought):
        content[-1]["thinking"] += part.text
    else:
        content[-1]["text"] += part


def _event(kind: str, content: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {dump({'type': kind, **content})}\n\n".encode()


async def _events(
    deltas: AsyncIterator[Delta], running: Running, blocks: _Blocks, message: dict[str, Any]
) -> AsyncIterator[bytes]:
    yield _event("message_start", {"message": message})
    yield _event("ping", {})
    index, kind = -1, ""  # the block that is open
    reason, stop = "end_turn", None
    async for delta in deltas:
        for part in blocks.feed(delta):
            block = _block(part)
            if block["type"] != kind or isinstance(part, ToolCall):
                if kind:
                    yield _event("content_block_stop", {"index": index})
                index, kind = index + 1, block["type"]
                yield _event("content_block_start", {"index": index, "content_block": block})
            if isinstance(part, Thought):
                more = {"type": "thinking_delta", "thinking": part.text}
            elif isinstance(part, ToolCall):
                more = {"type": "input_json_delta", "partial_json": part.arguments}
            else:
                more = {"type": "text_delta", "text": part}
            yield _event("content_block_delta", {"index": index, "delta": more})
        if delta.finish:
            reason, stop = blocks.reason(delta), delta.stop
    if kind:
        yield _event("content_block_stop", {"index": index})
    ended = {"stop_reason": reason, "stop_sequence": stop}
    yield _event("message_delta", {"delta": ended, "usage": _usage(running)})
    yield _event("message_stop", {})


def _paths(path: str) -> list[str]:
    return [f"/v1/{path}", f"/anthropic/api/v1/{path}", f"{HOSTED}/anthropic/api/v1/{path}"]


ROUTES = [
    *door(_paths("messages"), messages, encode_error, counted=False),
    *door(_paths("messages/count_tokens"), count_tokens, encode_error, counted=True),
]
