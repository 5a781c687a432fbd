"""OpenAI's completions and chat completions: requests in, answers and chunks out."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from tinsmith.service import errors
from tinsmith.service.completions import Delta, Prompt, Running, Target, Token, Usage
from tinsmith.text.parts import Part, Reader, Thought
from tinsmith.text.tokenizer import Tokenizer

from .doors import HOSTED, EventStream, all_of, begun, door, dump, guarded, while_there
from .http import Call, json_response
from .openai_requests import ChatRequest, CompletionRequest

_TYPES = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    402: ("insufficient_quota", "insufficient_quota"),
    403: ("permission_error", None),
    404: ("invalid_request_error", "model_not_found"),
    410: ("invalid_request_error", "model_not_found"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}


def encode_error(status: int, text: str, field: str | None, error: Exception | None) -> dict[str, object]:
    kind, code = _TYPES.get(status, ("server_error", None))
    if status == 404 and field != "model":
        code = "unknown_url"
    more = error.reached.fields() if isinstance(error, errors.Limited) else {}
    told = {"message": text, "type": kind, "param": field, "code": code, **more}
    return {"error": told, "detail": text}


@dataclass(slots=True)
class _Choice:
    """A choice as its pieces have come together."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.finish = delta.finish or self.finish


def _gather(deltas: Sequence[Delta], count: int) -> list[_Choice]:
    choices = [_Choice() for _ in range(count)]
    for delta in deltas:
        choices[delta.index].add(delta)
    return choices


def _usage(usage: Usage, completion: int | None = None) -> dict[str, object]:
    tokens = usage.completion if completion is None else completion
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": tokens,
        "total_tokens": usage.prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _head(prefix: str, kind: str, model: str) -> dict[str, object]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _event(content: object) -> bytes:
    return f"data: {dump(content)}\n\n".encode()


# Completions


async def completions(call: Call) -> Response:
    request = CompletionRequest.read(await call.fields())
    target = await call.service.completions.target(call.caller, request.model)
    wanted = await request.wanted(target)
    running = await call.service.completions.begin(call.caller, target, wanted, stream=request.stream)
    head = _head("cmpl", "text_completion", request.model)
    try:
        if request.stream:
            deltas = await while_there(call.request, begun(running.deltas()))
            events = _completion_events(deltas, running, request, target, wanted.prompts, head)
            return EventStream(guarded(events, encode_error, _event), running)
        gathered = _gather(
            await while_there(call.request, all_of(running.deltas())), len(wanted.prompts) * wanted.n
        )
    except BaseException:
        await running.close()
        raise
    tokenizer = target.tokenizer
    choices = []
    for index, choice in enumerate(gathered):
        number = index // wanted.n
        if request.only_prompt:
            choice.text, choice.tokens, choice.finish = "", [], "length"
        tokens = choice.tokens
        if request.echo:
            before = tokenizer.decode(wanted.prompts[number].tokens)
            choice.text = before + choice.text
            moved = [Token(t.id, t.offset + len(before), t.logprob, t.likeliest) for t in tokens]
            tokens = [*running.prompts.get(number, []), *moved]
        logprobs = _completion_logprobs(tokens, tokenizer) if wanted.logprobs is not None else None
        choices.append(
            {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish}
        )
    usage = _usage(running.usage, 0 if request.only_prompt else None)
    return json_response({**head, "choices": choices, "usage": usage})


async def _completion_events(
    deltas: AsyncIterator[Delta],
    running: Running,
    request: CompletionRequest,
    target: Target,
    prompts: Sequence[Prompt],
    head: dict[str, object],
) -> AsyncIterator[bytes]:
    def chunk(index: int, text: str, tokens: Sequence[Token], finish: str | None) -> bytes:
        logprobs = _completion_logprobs(tokens, target.tokenizer) if request.logprobs is not None else None
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return _event({**head, "choices": [choice], **more})

    more = {"usage": None} if request.include_usage else {}
    if request.echo:
        for index in range(len(prompts) * request.n):
            yield chunk(index, target.tokenizer.decode(prompts[index // request.n].tokens), [], None)
    async for delta in deltas:
        yield chunk(delta.index, delta.text, delta.tokens, delta.finish)
    if request.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(running.usage)})
    yield b"data: [DONE]\n\n"


def _shown(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI's number for what is not likely at all."""
    return -9999.0 if logprob == -math.inf else logprob


def _completion_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, object]:
    def likeliest(token: Token) -> dict[str, float | None] | None:
        if token.logprob is None:
            return None
        table = {tokenizer.token_text(id_): _shown(logprob) for id_, logprob in token.likeliest}
        return {**table, tokenizer.token_text(token.id): _shown(token.logprob)}

    return {
        "tokens": [tokenizer.token_text(token.id) for token in tokens],
        "token_logprobs": [_shown(token.logprob) for token in tokens],
        "top_logprobs": [likeliest(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


# Chat


async def chat_completions(call: Call) -> Response:
    request = ChatRequest.read(await call.fields())
    target = await call.service.completions.target(call.caller, request.model)
    wanted = await request.wanted(target)
    running = await call.service.completions.begin(call.caller, target, wanted, stream=request.stream)
    how = {"thoughts": request.thoughts, "parallel": request.parallel}
    answers = [_Answer(request.chat.reader(target, wanted.prompts[0], **how)) for _ in range(wanted.n)]
    try:
        if request.stream:
            head = _head("chatcmpl", "chat.completion.chunk", request.model)
            deltas = await while_there(call.request, begun(running.deltas()))
            events = _chat_events(deltas, running, request, target, answers, head)
            return EventStream(guarded(events, encode_error, _event), running)
        gathered = _gather(await while_there(call.request, all_of(running.deltas())), wanted.n)
    except BaseException:
        await running.close()
        raise
    choices = []
    for index, (choice, answer) in enumerate(zip(gathered, answers, strict=True)):
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        for delta in answer.feed(choice.text, choice.finish):
            for name, more in delta.items():
                message[name] = message.get(name, type(more)()) + more
        if "tool_calls" in message:
            message["content"] = message["content"] or None
            for entry in message["tool_calls"]:
                del entry["index"]
        logprobs = _chat_logprobs(choice.tokens, target.tokenizer) if request.logprobs is not None else None
        finish = answer.finish(choice.finish)
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
    head = _head("chatcmpl", "chat.completion", request.model)
    return json_response({**head, "choices": choices, "usage": _usage(running.usage)})


class _Answer:
    """An answer's text as what the client is told of it."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._called = 0

    def feed(self, text: str, finish: str | None) -> list[dict[str, Any]]:
        parts = self._reader.feed(text)
        return [self._tell(part) for part in [*parts, *(self._reader.rest() if finish else ())]]

    def finish(self, reason: str | None) -> str | None:
        return "tool_calls" if self._called and reason == "stop" else reason

    def _tell(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Thought):
            return {"reasoning_content": part.text}
        if isinstance(part, str):
            return {"content": part}
        self._called += 1
        function = {"name": part.name, "arguments": part.arguments}
        entry = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        return {"tool_calls": [{"index": self._called - 1, **entry}]}


async def _chat_events(
    deltas: AsyncIterator[Delta],
    running: Running,
    request: ChatRequest,
    target: Target,
    answers: Sequence[_Answer],
    head: dict[str, object],
) -> AsyncIterator[bytes]:
    more = {"usage": None} if request.include_usage else {}

    def chunk(
        index: int, delta: dict[str, Any], tokens: Sequence[Token] = (), finish: str | None = None
    ) -> bytes:
        logprobs = _chat_logprobs(tokens, target.tokenizer) if request.logprobs is not None else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _event({**head, "choices": [choice], **more})

    for index in range(request.n):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for delta in deltas:
        answer, tokens = answers[delta.index], delta.tokens
        told = answer.feed(delta.text, delta.finish)
        if tokens and not told and not delta.finish:
            told = [{"content": ""}]
        for each in told:
            yield chunk(delta.index, each, tokens)
            tokens = ()
        if delta.finish:
            yield chunk(delta.index, {}, tokens, answer.finish(delta.finish))
    if request.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(running.usage)})
    yield b"data: [DONE]\n\n"


def _chat_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, object]:
    def entry(id_: int, logprob: float | None) -> dict[str, object]:
        raw = list(tokenizer.token_bytes(id_))
        return {"token": tokenizer.token_text(id_), "logprob": _shown(logprob), "bytes": raw}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.likeliest]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _paths(path: str) -> list[str]:
    return [f"/v1/{path}", f"/oai/api/v1/{path}", f"{HOSTED}/oai/api/v1/{path}"]


ROUTES = [
    *door(_paths("completions"), completions, encode_error, counted=False),
    *door(_paths("chat/completions"), chat_completions, encode_error, counted=False),
]
