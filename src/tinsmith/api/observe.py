"""Around every HTTP request: its id, its time, its log line, its span."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinsmith import logs
from tinsmith.service.metrics import Metrics

log = logging.getLogger("tinsmith.api.requests")

_LONGEST = 128
_UNKNOWN = "none"  # the route of what matches none
_WAITED = 408  # a result that is not there yet is no news


class Span(Protocol):
    def end(self, route: str, status: int) -> None: ...


class Tracer(Protocol):
    """Makes a span of each HTTP request; see tinsmith.tracing."""

    def begin(self, method: str, headers: dict[str, str]) -> Span: ...


class Observe:
    """ASGI middleware. X-Request-ID is taken over where it is a plain name, and answered in any case."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        id_ = _id(headers.get("x-request-id", ""))
        token = logs.request_id.set(id_)
        span = self._tracer.begin(scope["method"], headers) if self._tracer is not None else None
        started, status = time.perf_counter(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id_.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            route = scope.get("tinsmith.route", _UNKNOWN)
            self._metrics.request(scope["method"], route, status, seconds)
            if span is not None:
                span.end(route, status)
            level = logging.INFO if status >= 400 and status != _WAITED else logging.DEBUG
            what = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 6)}
            log.log(level, "%s %s: %d", scope["method"], scope["path"], status, extra=what)
            logs.request_id.reset(token)


def _id(text: str) -> str:
    plain = 0 < len(text) <= _LONGEST and text.isascii() and text.isprintable() and " " not in text
    return text if plain else uuid.uuid4().hex
