"""What every route shares: who calls, reading a body within limits, answers, and errors as answers.

The status of an error decides what the SDK does with it (retry for minutes, give up, submit again),
so the mapping is in this one place. An answer always has a body: an empty 400 is taken for a proxy's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tinsmith.service import errors
from tinsmith.service.caller import Caller
from tinsmith.service.service import Service
from tinsmith.service.traces import request_began
from tinsmith.wire.compression import decompress
from tinsmith.wire.errors import BodyTooLarge, WireError
from tinsmith.wire.fields import Fields, parse_object

log = logging.getLogger("tinsmith.api")

PROTOBUF = "application/x-protobuf"
_SMALL = 1 << 14  # bytes of a compressed body

_STATUS: dict[type[errors.ServiceError], int] = {
    errors.Refused: 400,
    errors.Unauthorized: 401,
    errors.InvalidToken: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Gone: 410,
    errors.Unavailable: 503,
    errors.Unwritable: 400,
    errors.OverBudget: 402,
    errors.OverLimit: 429,
}


def json_response(content: object, status: int = 200) -> Response:
    body = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return Response(body, status, media_type="application/json")


def error_response(detail: str, status: int) -> Response:
    return json_response({"detail": detail}, status)


def service_error(error: errors.ServiceError) -> Response:
    status = _STATUS[type(error)]
    if isinstance(error, errors.Limited):
        answer = json_response({"detail": error.detail, **error.reached.fields()}, status)
        if status == 429:
            answer.headers["Retry-After"] = str(error.retry_after)
            answer.headers["X-Tinker-Sampling-Backpressure"] = "1"
        return answer
    answer = error_response(error.detail, status)
    if isinstance(error, errors.InvalidToken):  # the SDK then exchanges its key anew (RFC 6750)
        answer.headers["WWW-Authenticate"] = 'Bearer error="invalid_token"'
    return answer


def iso_time(seconds: float) -> str:
    """A time in answers: ISO 8601, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def time_text(seconds: float | None) -> str | None:
    return None if seconds is None else iso_time(seconds)


@dataclass(slots=True)
class Call:
    """One authenticated request."""

    request: Request
    service: Service
    caller: Caller

    def path(self, name: str) -> str:
        return str(self.request.path_params[name])

    @property
    def media_type(self) -> str:
        return self.request.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def wants_json(self) -> bool:
        """Whether the client reads JSON alone, as SDKs before 0.19 do."""
        accept = self.request.headers.get("accept", "")
        return "application/json" in accept and PROTOBUF not in accept and "*/*" not in accept

    def page(self, limit: int = 20, most: int = 1000) -> tuple[int, int]:
        """The limit and the offset of a listing."""
        return (
            _query_integer(self.request, "limit", limit, 1, most),
            _query_integer(self.request, "offset", 0, 0, 2**62),
        )

    @property
    def owned(self) -> bool:
        """Whether a listing shall have the caller's own things alone."""
        scope = self.request.query_params.get("access_scope", "accessible")
        if scope not in ("owned", "accessible"):
            raise errors.Refused(f"access_scope: must be owned or accessible, not {scope[:60]!r}")
        return scope == "owned"

    async def fields(self, *, halves: bool = False) -> Fields:
        """The body, as a JSON object; `halves` as parse_object has it."""
        body = await self.body()
        return parse_object(body, halves=halves) if body else Fields({})

    async def body(self) -> bytes:
        """The body, decompressed."""
        raw, compressed = await self.raw_body()
        return await self.decompress(raw) if compressed else raw

    async def raw_body(self) -> tuple[bytes, bool]:
        """The body as it came, and whether it is zstd."""
        encoding = self.request.headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "zstd"):
            raise errors.Refused(f"Content-Encoding: {encoding!r} is not known here; use zstd or none")
        return await read_body(self.request, self.service.context.settings.body_limit), encoding == "zstd"

    async def decompress(self, raw: bytes) -> bytes:
        """Small bodies here and now: a thread's turn takes longer, and may come behind those of a flood."""
        if len(raw) <= _SMALL:
            with contextlib.suppress(BodyTooLarge):  # of this limit
                return decompress(raw, min(16 * _SMALL, self.service.context.settings.body_limit))
        return await asyncio.to_thread(decompress, raw, self.service.context.settings.body_limit)


async def read_body(request: Request, limit: int) -> bytes:
    """The body as it came. One that is too long is read to its end, since a client that still sends
    does not hear an answer, but not kept."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > 16 * limit:
            break
    body = b"".join(parts)
    if size > limit:
        raise BodyTooLarge(limit, body[: 1 << 16])
    return body


Endpoint = Callable[[Call], Awaitable[Response]]
SignedEndpoint = Callable[[Request, Service], Awaitable[Response]]


def route(
    path: str, endpoint: Endpoint, *, method: str = "POST", counted: bool = True, act: str | None = None
) -> Route:
    """A route for callers with a key, once the server has started. A `counted` one counts towards the
    requests of a minute, and is refused beyond; training requests and samples are counted elsewhere.
    `act` is what it does in the words of the audit log ("checkpoint delete"), which tells of those who
    were refused it."""

    async def work(request: Request, service: Service) -> Response:
        caller = await authenticate(request)
        service.check_open()
        if counted:
            service.context.limits.check_call(caller.who)
        try:
            return await endpoint(Call(request, service, caller))
        except errors.Forbidden as error:
            if act is not None:
                resource, _, what = act.partition(" ")
                await service.audit.denied(caller, resource, what, error.detail, request.path_params)
            raise

    return Route(f"/api/v1/{path}", _guarded(path, work), methods=[method])


def signed_route(path: str, endpoint: SignedEndpoint, *, method: str) -> Route:
    """A route that needs no key: its addresses are signed, and the endpoint checks that."""

    async def work(request: Request, service: Service) -> Response:
        service.check_open()
        return await endpoint(request, service)

    return Route(f"/api/v1/{path}", _guarded(path, work), methods=[method])


def _guarded(path: str, work: SignedEndpoint) -> Callable[[Request], Awaitable[Response]]:
    """`work`, with errors as answers."""

    async def handle(request: Request) -> Response:
        request_began.set(time.time())
        request.scope["tinsmith.route"] = path
        try:
            return await work(request, request.app.state.service)
        except errors.ServiceError as error:
            return service_error(error)
        except WireError as error:
            return error_response(str(error), 400)
        except ClientDisconnect:
            return error_response("the client has gone", 400)
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            return error_response("the server failed; its log says why", 500)

    return handle


async def authenticate(request: Request) -> Caller:
    service: Service = request.app.state.service
    return await service.keys.authenticate(credential_of(request))


def credential_of(request: Request) -> str | None:
    """The key or the token that a request came with."""
    key = request.headers.get("x-api-key")
    if key is None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        key = token if scheme.lower() == "bearer" else None
    return key.strip() if key else None


def root_of(request: Request, service: Service) -> str:
    """The server's address as the caller knows it: what is set, else what a proxy says, else what the
    request itself was sent to."""
    settings = service.context.settings
    if settings.public_url:
        return settings.public_url.rstrip("/")
    headers = request.headers
    scheme = headers.get("x-forwarded-proto", request.url.scheme).split(",")[0].strip()
    host = headers.get("x-forwarded-host", headers.get("host", request.url.netloc)).split(",")[0].strip()
    return f"{scheme}://{host}{settings.root_path.rstrip('/')}"


def _query_integer(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        return max(least, min(int(text), most))
    except ValueError:
        raise errors.Refused(f"{name}: must be an integer, not {text[:60]!r}") from None
