"""A run's state on the disk: snapshots while it trains, and whole while nobody needs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable

from tinsmith.engine.commands import EngineLost, Failed, Reply
from tinsmith.store.runs import RunRow

from . import shelf
from .context import Context
from .recorder import Recorder
from .recovery import Recovery
from .replay import Base
from .snapshots import Snapshots

log = logging.getLogger("tinsmith.service.run")


class Keeping(Recovery):
    def __init__(self, context: Context, recorder: Recorder, row: RunRow) -> None:
        super().__init__(context, recorder, row)
        self._snapshots = Snapshots(context.settings.snapshot_every)

    def _take_snapshot(self, seq_id: int) -> None:
        """Have the state after the command that has just been handed over written down."""
        key, command = shelf.new_snapshot(self._context, self.row, seq_id)
        self._snapshots.begin()
        reply = self._context.engine.submit(command)
        self._fly(self._keep_snapshot(key, seq_id, reply, set(self._in_flight)))

    async def _keep_snapshot(
        self, key: str, seq_id: int, reply: Awaitable[Reply], before: set[asyncio.Task[object]]
    ) -> None:
        started, ended, kept = None, 0.0, False
        try:
            written = await reply
            if isinstance(written, Failed):
                log.warning("no snapshot of run %s could be written: %s", self.row.id, written.message)
            else:
                started, ended = written.times.get("started"), time.time()
                # What the state is made of must be known in the log before it counts.
                await asyncio.wait(before)
                if self.phase not in ("lost", "failed", "closed"):
                    kept = await shelf.note(self._context, self.row, key, seq_id)
        except EngineLost:
            pass
        except Exception as error:
            log.error("a snapshot of run %s could not be kept: %s", self.row.id, error)
        self._snapshots.end(started, ended)
        if kept:
            self._snapshot = Base(key, seq_id)
        else:
            await asyncio.to_thread(self._context.blobs.delete, key)

    async def put_away(self) -> None:
        """Put the run's state into a snapshot and free the engine's memory. Nothing is lost."""
        async with self._moving:
            if self.phase != "live" or not self._context.engine.ready:
                return
            await self._landed.wait()
            if self.phase != "live":
                return
            with contextlib.suppress(EngineLost):
                seq_id = self._line.next_seq - 1
                key = await shelf.put_away(self._context, self.row, seq_id)
                if key is not None:
                    self.phase, self._snapshot = "away", Base(key, seq_id)
