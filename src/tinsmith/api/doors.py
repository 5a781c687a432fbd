"""What the doors for other clients share: their routes, events, clients that go away, and reading requests
of which nothing may be ignored."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from typing import Any, TypeVar

from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tinsmith.service import errors
from tinsmith.service.completions import Running
from tinsmith.service.traces import request_began
from tinsmith.text.tokenizer import is_unicode
from tinsmith.wire.errors import BodyTooLarge, WireError
from tinsmith.wire.fields import Fields

from .http import _STATUS, Call, Endpoint, authenticate

log = logging.getLogger("tinsmith.api")

T = TypeVar("T")
HOSTED = "/services/tinker-prod"  # where the hosted service has its doors
MOST_STOPS = 16


class Anything(PathConvertor):
    """The rest of a path, line breaks and all: also such a name is not found in its door's own words."""

    regex = "(?s:.*)"


register_url_convertor("anything", Anything())

# status, what is wrong, the field that it is about, the error that it comes from
Encode = Callable[[int, str, str | None, Exception | None], dict[str, object]]


def door(
    paths: Collection[str], endpoint: Endpoint, encode: Encode, *, method: str = "POST", counted: bool
) -> list[Route]:
    """One endpoint at several addresses, with errors in the shape of its clients."""

    async def handle(request: Request) -> Response:
        request_began.set(time.time())
        try:
            service = request.app.state.service
            caller = await authenticate(request)
            service.check_open()
            if counted:
                service.context.limits.check_call(caller.who)
            return await endpoint(Call(request, service, caller))
        except Exception as error:
            answer = door_error(error, encode)
            if answer.status_code == 500:
                log.exception("%s %s failed", request.method, request.url.path)
            return answer

    return [Route(path, handle, methods=[method]) for path in paths]


def door_error(error: Exception, encode: Encode) -> Response:
    status, body, headers = describe(error, encode)
    return Response(json.dumps(body), status, headers, media_type="application/json")


def describe(error: Exception, encode: Encode) -> tuple[int, dict[str, object], dict[str, str]]:
    """An error as status, body and headers."""
    headers: dict[str, str] = {}
    if isinstance(error, errors.Limited) and _STATUS[type(error)] == 429:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, errors.ServiceError):
        found = re.match(r"([a-z_]+(?:\[\d+\])*(?:\.[a-z_]+(?:\[\d+\])*)*): ", error.detail)
        text, field = error.detail, found[1] if found else None
        if field in ("base_model", "model_path"):
            text, field = "model" + text.removeprefix(field), "model"
        return _STATUS[type(error)], encode(_STATUS[type(error)], text, field, error), headers
    if isinstance(error, BodyTooLarge):
        return 413, encode(413, str(error), None, error), headers
    if isinstance(error, WireError):
        field = "model" if error.field == "model_path" else error.field
        return 400, encode(400, f"{field}: {error.problem}", field, error), headers
    if isinstance(error, RecursionError):
        return 400, encode(400, "body: is nested too deeply", None, error), headers
    if isinstance(error, ClientDisconnect):
        return 400, encode(400, "the client has gone", None, error), headers
    return 500, encode(500, "the server failed; its log says why", None, error), headers


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`work`, which is cancelled when the client goes away. Raises ClientDisconnect then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.wait({doing, leaving})


class EventStream(StreamingResponse):
    """Server-sent events of what runs, which is stopped when the client goes away."""

    def __init__(self, events: AsyncIterator[bytes], running: Running) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._running.close()


async def guarded(
    events: AsyncIterator[bytes], encode: Encode, say: Callable[[dict[str, object]], bytes]
) -> AsyncIterator[bytes]:
    """`events`, with an error on the way as the last of them."""
    try:
        async for event in events:
            yield event
    except Exception as error:
        status, body, _ = describe(error, encode)
        if status == 500:
            log.exception("a stream failed")
        yield say(body)


async def all_of(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]


async def begun(items: AsyncIterator[T]) -> AsyncIterator[T]:
    """`items`, once the first has come: what fails at once is then an answer instead of an event."""
    first = await anext(items, None)

    async def again() -> AsyncIterator[T]:
        if first is not None:
            yield first
        async for item in items:
            yield item

    return again()


def dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def refuse_unknown(fields: Fields, known: Collection[str], api: str) -> None:
    for name, value in fields.values().items():
        if name not in known and value is not None:
            raise fields.error(name[:80], f"is not offered by this server's {api}; leave it out")


def refuse_unless(fields: Fields, name: str, *values: object) -> None:
    """Refuse a field unless it says what happens anyway."""
    value = fields.raw(name)
    if value is not None and not any(
        value == v and isinstance(value, bool) == isinstance(v, bool) for v in values
    ):
        shown = ", ".join(json.dumps(v) for v in values)
        raise fields.error(
            name,
            f"cannot be honoured by this server; leave it out{f' or set it to {shown}' if shown else ''}",
        )


def read_stops(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.raw(name)
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(s, str) and s and is_unicode(s) for s in stops)
    ):
        raise fields.error(name, f"must be texts that are not empty, at most {MOST_STOPS} of them")
    return tuple(stops)


def read_top_p(fields: Fields) -> float:
    top_p = fields.number("top_p", 1.0, most=1.0)
    if top_p <= 0:
        raise fields.error("top_p", f"must be greater than 0 and at most 1, not {top_p:g}")
    return top_p
