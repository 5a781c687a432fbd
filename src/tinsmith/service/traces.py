"""When each request came, waited, ran and was fetched: recorded as it happens, and kept within bounds.

Nothing here is worth a disk write of its own: a request's times are kept in memory until its result was
fetched, then written a few hundred at a time. A crash loses the last minute of them.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import zstandard

from tinsmith.store import Store, traces
from tinsmith.store.scope import Scope
from tinsmith.store.traces import TraceChunk
from tinsmith.wire.timeline import Request

MOST_OF_SESSION = 50_000  # requests whose times are kept; the oldest ones go
_CHUNK = 256  # requests that are written together
_PATIENCE = 60.0  # seconds after which a result that nobody fetched counts as final
_MOST_OPEN = 200_000

# When the HTTP request that is being handled came in. Set by the API; time.time() where there is none.
request_began: ContextVar[float | None] = ContextVar("request_began", default=None)


@dataclass(frozen=True, slots=True)
class _Open:
    org_id: str
    session_id: str
    request: Request
    context: object = None  # of the observer


class Observer(Protocol):
    """Is told of every request at its end; see tinsmith.tracing."""

    def here(self) -> object: ...

    def final(self, request: Request, parent: object) -> None: ...


@dataclass(slots=True)
class _Session:
    """What is known of a session and not written down yet."""

    org_id: str
    final: list[Request] = field(default_factory=list)
    since: float = 0.0
    kept: int | None = None  # how many are written down; None: not looked up yet


class Traces:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: dict[str, _Open] = {}
        self._sessions: dict[str, _Session] = {}
        self.observer: Observer | None = None

    # As it happens

    def accepted(
        self, org_id: str, session_id: str, request_id: str, kind: str, track: str, received_bytes: int = 0
    ) -> None:
        """A request has just been taken; its outcome will be told."""
        if not session_id or request_id in self._open:
            return
        if len(self._open) >= _MOST_OPEN:
            self._finish(next(iter(self._open)))
        now = time.time()
        request = Request(
            request_id, kind, track, request_began.get() or now, now, received_bytes=received_bytes
        )
        context = self.observer.here() if self.observer is not None else None
        self._open[request_id] = _Open(org_id, session_id, request, context)

    def started(self, request_id: str, when: float | None) -> None:
        """The engine began with it at `when`."""
        if when is not None and (known := self._open.get(request_id)) is not None:
            known.request.started = when

    def ended(self, request_id: str, outcome: str, usage: dict[str, int]) -> None:
        if (known := self._open.get(request_id)) is not None and known.request.ended is None:
            known.request.ended, known.request.outcome = time.time(), outcome
            known.request.usage = usage

    def sent(self, request_id: str, asked_at: float, size: int) -> None:
        """Its outcome is on its way to whoever has been asking for it since `asked_at`."""
        known = self._open.get(request_id)
        if known is not None and known.request.ended is not None:
            request = known.request
            request.fetched = max(asked_at, known.request.ended)
            request.sent, request.sent_bytes = time.time(), size
            self._finish(request_id)

    def _finish(self, request_id: str) -> None:
        known = self._open.pop(request_id)
        if self.observer is not None:
            self.observer.final(known.request, known.context)
        session = self._sessions.setdefault(known.session_id, _Session(known.org_id))
        if not session.final:
            session.since = time.time()
        session.final.append(known.request)

    # Onto the disk

    def flush(self, *, everything: bool = False) -> None:
        """Write down what is final, where it has become enough or has waited for long."""
        now = time.time()
        for request_id, known in list(self._open.items()):
            ended = known.request.ended
            if ended is not None and (everything or now - ended > _PATIENCE):
                self._finish(request_id)
        for session_id, session in list(self._sessions.items()):
            if session.final and (
                everything or len(session.final) >= _CHUNK or now - session.since > _PATIENCE
            ):
                self._write(session_id, session, now)
            elif not session.final and now - session.since > 10 * _PATIENCE:
                del self._sessions[session_id]

    def _write(self, session_id: str, session: _Session, now: float) -> None:
        final, session.final = session.final, []
        chunk = TraceChunk(session.org_id, session_id, now, len(final), _pack(final))
        self._store.write_soon(lambda connection: traces.add(connection, chunk))
        if session.kept is None or session.kept + len(final) > 1.1 * MOST_OF_SESSION:
            session.kept = MOST_OF_SESSION
            self._store.write_soon(
                lambda connection: traces.keep_newest(connection, session_id, MOST_OF_SESSION)
            )
        else:
            session.kept += len(final)

    async def sweep(self, ttl: float, most_bytes: int) -> None:
        """Forget what is older than `ttl` seconds, and the oldest beyond `most_bytes`."""
        before = time.time() - ttl
        await self._store.write(lambda connection: traces.drop_old(connection, before, most_bytes))

    # Looking back

    async def of_session(self, session_id: str, scope: Scope) -> list[Request]:
        """The times of all its requests that are known, pending ones among them."""
        chunks = await self._store.read(lambda connection: traces.of_session(connection, session_id, scope))
        session = self._sessions.get(session_id)
        live = [replace(each) for each in session.final] if session is not None else []
        live += [replace(known.request) for known in self._open.values() if known.session_id == session_id]
        return [*(await asyncio.to_thread(_unpack_all, chunks)), *live]


def _pack(requests: list[Request]) -> bytes:
    rows = [list(asdict(request).values()) for request in requests]
    return zstandard.ZstdCompressor().compress(json.dumps(rows, separators=(",", ":")).encode())


def _unpack_all(chunks: list[bytes]) -> list[Request]:
    decompressor = zstandard.ZstdDecompressor()
    return [Request(*row) for chunk in chunks for row in json.loads(decompressor.decompress(chunk))]
