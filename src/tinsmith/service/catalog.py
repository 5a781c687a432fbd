"""Looking at what there is: runs and checkpoints, and the little that may be changed about them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

from tinsmith.store import Connection, checkpoint_search, checkpoints, runs
from tinsmith.store.checkpoint_search import FoundCheckpoint
from tinsmith.store.checkpoints import CheckpointRow
from tinsmith.store.runs import RunRow
from tinsmith.store.scope import SERVER
from tinsmith.wire.checkpoint_search import CheckpointSearch
from tinsmith.wire.paths import TinkerPath

from .audit import Actor, about_checkpoint, record
from .caller import Caller
from .context import Context
from .errors import NotFound, Refusal
from .runs import Runs
from .samplers import Samplers
from .sessions import Sessions
from .steps import Source, find_checkpoint

Checkpoint = CheckpointRow


@dataclass(frozen=True, slots=True)
class RunView:
    """A run as listings show it."""

    row: RunRow
    last_request_at: float
    newest: CheckpointRow | None
    newest_sampler: CheckpointRow | None
    lost: bool


class Catalog:
    def __init__(self, context: Context, sessions: Sessions, runs: Runs, samplers: Samplers) -> None:
        self._context = context
        self._sessions = sessions
        self._runs = runs
        self._samplers = samplers

    async def run(self, caller: Caller, run_id: str) -> RunView:
        run = await self._runs.get(caller, run_id)
        return (await self._views([run.row]))[0]

    async def list_runs(
        self, caller: Caller, limit: int, offset: int, *, own: bool, project: str | None
    ) -> tuple[list[RunView], int]:
        """The newest first, of all that the caller may see or of its own, everywhere or in one project."""
        scope = caller.scope().mine() if own else caller.scope()
        if project is not None:
            scope = scope.within(await self._sessions.listable(caller, project, "project_id"))
        rows, total = await self._context.store.read(
            lambda connection: runs.page(connection, scope, limit, offset)
        )
        return await self._views(rows), total

    async def _views(self, rows: list[RunRow]) -> list[RunView]:
        now = time.time()
        lost = [self._runs.is_lost(row) for row in rows]

        def look(connection: Connection) -> list[RunView]:
            return [
                RunView(
                    row,
                    self._runs.last_used(row),
                    checkpoints.newest(connection, row.id, "training", SERVER, now),
                    checkpoints.newest(connection, row.id, "sampler", SERVER, now),
                    is_lost,
                )
                for row, is_lost in zip(rows, lost, strict=True)
            ]

        return await self._context.store.read(look)

    async def checkpoints_of_run(self, caller: Caller, run_id: str) -> list[CheckpointRow]:
        """In the order in which they were saved. The first part of a run's id, its session's, stands for all
        of the session's runs: Tinker's tutorial asks with it."""
        if ":" in run_id:
            await self._runs.get(caller, run_id)
            ids = [run_id]
        else:
            try:
                _, ids, _ = await self._sessions.members(caller, run_id)
            except NotFound:
                raise NotFound(f"model_id: there is no training run {run_id[:120]!r}") from None
        scope, now = caller.scope(), time.time()
        found = await self._context.store.read(
            lambda connection: [
                row for each in ids for row in checkpoints.of_run(connection, each, scope, now)
            ]
        )
        return sorted(found, key=lambda row: row.created_at)

    async def list_checkpoints(
        self, caller: Caller, limit: int, offset: int
    ) -> tuple[list[CheckpointRow], int]:
        return await self._context.store.read(
            lambda connection: checkpoints.page(connection, caller.scope(), limit, offset, time.time())
        )

    async def search_checkpoints(
        self, caller: Caller, wanted: CheckpointSearch
    ) -> tuple[list[FoundCheckpoint], bool]:
        """A page of what is found, and whether there is more."""
        scope = caller.scope()
        if wanted.owner == "own":
            scope = scope.mine()
        if wanted.project_ids is not None:
            ids = [
                await self._sessions.listable(caller, each, f"project_ids[{i}]")
                for i, each in enumerate(wanted.project_ids)
            ]
            wanted = replace(wanted, project_ids=tuple(ids))
        found = await self._context.store.read(
            lambda connection: checkpoint_search.search(connection, scope, wanted, time.time())
        )
        return found[: wanted.limit], len(found) > wanted.limit

    async def checkpoint(
        self, caller: Caller, path: TinkerPath, *, own: bool = False
    ) -> tuple[CheckpointRow, Source]:
        """A checkpoint that the caller may read, or with `own` look after."""
        try:
            row, source = await find_checkpoint(self._context, path, caller.scope(), own=own)
        except Refusal as refusal:
            raise NotFound(str(refusal)) from None
        if own:
            caller.require(source.project_id, "work")
        return row, source

    async def delete_checkpoint(self, caller: Caller, path: TinkerPath) -> None:
        row, _ = await self.checkpoint(caller, path, own=True)

        def work(connection: Connection) -> None:
            checkpoints.delete(connection, row.id)
            _record(connection, caller, "delete", path)

        await self._context.write(work)
        await self._forget(row)

    async def publish(self, caller: Caller, path: TinkerPath, public: bool) -> None:
        """Let every organization read a checkpoint, or its own alone. Whoever has its path can load it
        and sample from it; it is listed for its owner only. Doing it again changes nothing: the SDK
        repeats a call whose answer was lost."""
        row, _ = await self.checkpoint(caller, path, own=True)
        if public != (row.published_at is not None):
            when = time.time() if public else None

            def work(connection: Connection) -> None:
                checkpoints.set_published(connection, row.id, when)
                _record(connection, caller, "publish" if public else "unpublish", path)

            await self._context.write(work)

    async def set_ttl(self, caller: Caller, path: TinkerPath, ttl_seconds: int | None) -> None:
        row, _ = await self.checkpoint(caller, path, own=True)
        expires = time.time() + ttl_seconds if ttl_seconds is not None else None

        def work(connection: Connection) -> None:
            checkpoints.set_expiry(connection, row.id, expires)
            _record(connection, caller, "ttl_set", path, {"ttl_seconds": ttl_seconds})

        await self._context.write(work)

    async def sweep(self) -> None:
        """Delete checkpoints whose time has come."""
        now = time.time()
        for row in await self._context.store.read(
            lambda connection: checkpoints.expired(connection, SERVER, now)
        ):
            await self._context.store.write(partial(checkpoints.delete, checkpoint_id=row.id))
            await self._forget(row)

    async def _forget(self, row: CheckpointRow) -> None:
        self._samplers.forget_checkpoint(row.id)
        await self._context.drop_files(row.folder)


def _record(
    connection: Connection,
    caller: Caller,
    act: str,
    path: TinkerPath,
    how: dict[str, object] | None = None,
) -> None:
    record(connection, Actor.of(caller), caller.org_id, "checkpoint", act, about_checkpoint(path), how)
