"""Client sessions: who is alive.

A session that finishes takes its samplers and its runs' memory along. One that falls silent keeps
everything, but off the device: its runs are put away, and come back with its next request.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from decimal import Decimal
from functools import partial

from tinsmith.store import Connection, projects, session_search, sessions
from tinsmith.store.scope import SERVER, Scope
from tinsmith.store.session_search import FoundSession
from tinsmith.store.sessions import SessionRow
from tinsmith.wire.requests import CreateSession, FinishSession
from tinsmith.wire.session_search import SessionSearch

from .access import Right
from .audit import Actor, record
from .caller import Caller
from .context import Context
from .errors import Forbidden, Gone, NotFound
from .metering import ZERO, month_of, spent_by_place
from .session_status import how_it_ended, status_of

__all__ = ["FoundSession", "Sessions"]

_LATE = 60.0  # seconds that a write may have taken from its time to its place in the database


class Sessions:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._rows: dict[str, SessionRow] = {}
        self._seen: dict[str, float] = {}  # monotonic; sessions whose clients are taken for alive
        self._looked = time.time()
        self.on_finish: list[Callable[[str], Awaitable[None]]] = []
        self.on_move: list[Callable[[str, str], None]] = []
        self.on_silence: list[Callable[[str], Awaitable[None]]] = []

    async def create(self, caller: Caller, request: CreateSession) -> str:
        project = await self.project(caller, request.project_id, "sample", "project_id")
        row = SessionRow(
            id=str(uuid.uuid4()),
            org_id=caller.org_id,
            project_id=project,
            user_id=caller.user_id,
            key_id=caller.key_id,
            created_at=time.time(),
            finished_at=None,
            finish_reason=None,
            finish_detail=None,
            tags=sorted(request.tags),
            user_metadata=request.user_metadata,
            sdk_version=request.sdk_version,
            display_name=request.display_name,
        )
        await self._context.write(lambda connection: sessions.add(connection, row))
        self._rows[row.id] = row
        self.seen(row.id)
        return row.id

    async def get(self, caller: Caller, session_id: str) -> SessionRow:
        row, scope = self._rows.get(session_id), caller.scope()
        if row is not None and scope.sees(row):
            return row
        row = await self._context.store.read(lambda connection: sessions.get(connection, session_id, scope))
        if row is None:
            raise NotFound(f"session_id: there is no session {session_id[:80]!r}")
        return self._rows.setdefault(session_id, row)

    def at_hand(self, session_id: str, scope: Scope) -> SessionRow | None:
        """A session that is in memory already, where `scope` sees it."""
        row = self._rows.get(session_id)
        return row if row is not None and scope.sees(row) else None

    async def search(self, caller: Caller, wanted: SessionSearch) -> tuple[list[FoundSession], bool]:
        """A page of what is found, and whether there is more."""
        scope = caller.scope()
        if wanted.owner == "own":
            scope = scope.mine()
        if wanted.project_ids is not None:
            ids = [await self.listable(caller, each, f"project_ids[{i}]")
                   for i, each in enumerate(wanted.project_ids)]  # fmt: skip
            wanted = replace(wanted, project_ids=tuple(ids))
        alive = frozenset(self._seen)
        found = await self._context.store.read(
            lambda connection: session_search.search(connection, scope, wanted, alive, time.time())
        )
        return found[: wanted.limit], len(found) > wanted.limit

    async def listable(self, caller: Caller, project: str, field: str) -> str:
        """The id of a project, given by id or name, in which the caller may look around."""
        row = await self._context.store.read(
            lambda connection: projects.find(connection, caller.org_id, project)
        )
        if row is None or not caller.may(row.id, "see"):
            raise NotFound(f"{field}: there is no project {project[:80]!r}")
        return row.id

    def status(self, row: SessionRow) -> dict[str, object] | None:
        return status_of(row, row.id in self._seen)

    async def move(self, caller: Caller, session_id: str, project: str) -> None:
        """Put a session with its runs into another project."""
        row = await self.get(caller, session_id)
        caller.require(row.project_id, "work")
        found = await self._context.store.read(
            lambda connection: projects.find(connection, caller.org_id, project)
        )
        if found is None or not caller.may(found.id, "work"):
            raise Forbidden(
                f"project_id: there is no project {project[:80]!r}, or this key may not work in it"
            )

        month = month_of(time.time())

        def work(connection: Connection) -> tuple[str, Decimal]:
            old = sessions.move(connection, session_id, found.id)
            about = {"session_id": session_id, "project_id": old}
            record(connection, Actor.of(caller), caller.org_id, "session", "move", about, {"to": found.id})
            whole = Scope(caller.org_id, caller.user_id, None)
            spent = spent_by_place(connection, whole, month, session_id)
            return old, spent.get((caller.org_id, found.id), ZERO)

        old, spent = await self._context.write(work)
        self._context.meter.moved(session_id, caller.org_id, old, found.id, spent)
        if session_id in self._rows:
            self._rows[session_id] = replace(self._rows[session_id], project_id=found.id)
        for react in self.on_move:
            react(session_id, found.id)

    async def project(self, caller: Caller, wanted: str | None, right: Right, field: str) -> str:
        """The project that something new goes to, by id or by name; `field` says so in errors."""
        if wanted is None:
            project_id = caller.home
        else:
            row = await self._context.store.read(
                lambda connection: projects.find(connection, caller.org_id, wanted)
            )
            if row is None or not caller.rights.get(row.id, caller.elsewhere):
                raise NotFound(f"{field}: there is no project {wanted[:80]!r}")
            project_id = row.id
        caller.require(project_id, right)
        return project_id

    async def open(self, caller: Caller, session_id: str, right: Right) -> SessionRow:
        """A session in which the caller may make something new."""
        row = await self.get(caller, session_id)
        caller.require(row.project_id, right)
        if row.finished_at is not None:
            raise Gone(
                f"session_id: the session {session_id} {how_it_ended(row)}; create a new ServiceClient"
            )
        self.seen(session_id)
        return row

    def was_cancelled(self, session_id: str) -> bool:
        row = self._rows.get(session_id)
        return row is not None and row.finish_reason == "cancelled"

    async def end_of(self, session_id: str) -> str | None:
        """How a session has ended, in words; None while it goes on."""
        row = self._rows.get(session_id)
        if row is None:
            row = await self._context.store.read(
                lambda connection: sessions.get(connection, session_id, SERVER)
            )
        return how_it_ended(row) if row is not None and row.finished_at is not None else None

    def seen(self, session_id: str) -> None:
        self._seen[session_id] = time.monotonic()

    async def heard_of(self, caller: Caller, session_id: str) -> None:
        """Its client lives."""
        row = await self.get(caller, session_id)
        caller.require_over(row)
        if row.finished_at is not None:
            raise Gone(f"session_id: the session {session_id} {how_it_ended(row)}")
        self.seen(session_id)

    async def finish(self, caller: Caller, session_id: str, request: FinishSession) -> None:
        row = await self.get(caller, session_id)
        caller.require_over(row)
        if row.finished_at is not None:
            return
        now = time.time()
        self._ended(
            await self._context.store.write(
                lambda connection: sessions.finish(
                    connection, session_id, request.reason, request.detail, now
                )
            )
        )

    def _ended(self, row: SessionRow) -> None:
        known = self._rows.get(row.id)
        if known is not None and known.finished_at is not None:
            return
        self._rows[row.id] = row
        self._seen.pop(row.id, None)
        for react in self.on_finish:
            self._context.spawn(_call(react, row.id))

    async def look_for_ends(self) -> None:
        """Take note of the sessions that another process has ended: the operator's commands."""
        since, self._looked = self._looked, time.time()
        rows = await self._context.store.read(
            lambda connection: sessions.finished_since(connection, SERVER, since - _LATE)
        )
        for row in rows:
            self._ended(row)

    def look_for_silence(self) -> None:
        """Release the memory of sessions that gave no sign of life for too long."""
        oldest = time.monotonic() - self._context.settings.heartbeat_timeout
        for session_id in [id_ for id_, seen in self._seen.items() if seen < oldest]:
            del self._seen[session_id]
            for react in self.on_silence:
                self._context.spawn(_call(react, session_id))

    async def take_up(self) -> None:
        """After a start: give every client that may still be there the time to be heard."""
        for row in await self._context.store.read(partial(sessions.unfinished, scope=SERVER)):
            self._rows[row.id] = row
            self.seen(row.id)

    async def page(self, caller: Caller, limit: int, offset: int, *, own: bool) -> list[SessionRow]:
        """The newest first, of all that the caller may see or of its own."""
        scope = caller.scope().mine() if own else caller.scope()
        return await self._context.store.read(
            lambda connection: sessions.page(connection, scope, limit, offset)
        )

    async def members(self, caller: Caller, session_id: str) -> tuple[SessionRow, list[str], list[str]]:
        scope = caller.scope()

        def look(connection: Connection) -> tuple[SessionRow | None, tuple[list[str], list[str]]]:
            members = sessions.members(connection, session_id, scope)
            return sessions.get(connection, session_id, scope), members

        row, (runs, samplers) = await self._context.store.read(look)
        if row is None:
            raise NotFound(f"session_id: there is no session {session_id[:80]!r}")
        return row, runs, samplers


async def _call(react: Callable[[str], Awaitable[None]], session_id: str) -> None:
    await react(session_id)
