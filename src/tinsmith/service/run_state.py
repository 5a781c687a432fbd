"""What a training run is, whatever is done with it: its phase, what waits, and what is at the engine.

A run is in one of these phases:

    fresh    its create command has not been carried out yet
    live     an engine holds its state
    away     its whole state lies in a snapshot; the next command brings it back
    crashed  the engine that held it died; the next command brings it back, by way of a replay
    lost     the log does not give its state back; nothing but a checkpoint is left
    failed   it could not be created
    closed   its session has finished
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, Literal

from tinsmith.store.commands import Logged
from tinsmith.store.runs import RunRow

from . import replay
from .context import Context
from .futures import Failure, PendingRequest
from .line import Entry, Line
from .recorder import Recorder
from .replay import Base, Progress

Phase = Literal["fresh", "live", "away", "crashed", "lost", "failed", "closed"]


class RunState:
    def __init__(self, context: Context, recorder: Recorder, row: RunRow) -> None:
        self.row = row
        self._context = context
        self._recorder = recorder
        self._phase: Phase = _phase_of(row)
        self._snapshot = _snapshot_of(row)
        self._line = Line(0 if self.phase == "fresh" else max(row.snapshot_seq or 0, row.turn_seq or 0) + 1)
        self._in_flight: set[asyncio.Task[object]] = set()
        self._landed = asyncio.Event()
        self._landed.set()
        # Held while a command is handed over, and while the whole state moves in or out.
        self._moving = asyncio.Lock()
        self._held = False
        self._replay = Progress()
        self._why_failed = ""
        self._end = "has finished"  # how the session has ended, once it has
        self._why_lost = row.lost or ""
        self._lost_message: str | None = None

    def was_closed(self, end: str) -> None:
        """The session had finished, as `end` says, before this run was asked for again."""
        self._end, self.phase = end, "closed"

    @property
    def phase(self) -> Phase:
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase = phase
        if phase != "live":
            self._context.limits.leave(self.row.id)

    def _entry(self, each: Logged, fate: str, *, suspect: bool) -> Entry:
        request = PendingRequest(each.request_id)
        return Entry(
            seq_id=each.seq_id,
            request=self._recorder.expect(request) if fate == "queued" else request,
            kind=each.kind,
            encoding=each.encoding,
            body=None,
            body_key=each.body_key,
            arrived_at=each.arrived_at,
            refused=fate == "failed",
            key_id=each.key_id or "",
            again=fate == "done",
            suspect=suspect and fate == "queued",
            attempts=each.attempts,
            loaded=each.loaded,
        )

    def _fly(self, work: Coroutine[Any, Any, object]) -> None:
        """Something of this run is at the engine, until `work` is done with its answer."""
        task = self._context.spawn(work)
        self._in_flight.add(task)
        self._landed.clear()
        task.add_done_callback(self._land)

    def _land(self, task: asyncio.Task[object]) -> None:
        self._in_flight.discard(task)
        if not self._in_flight:
            self._landed.set()

    async def _fail(self, entry: Entry, message: str | None) -> None:
        failure = Failure(message or await self._why_not(), "user" if message else "server")
        await self._recorder.record(entry.request, failure, {}, None)

    def _fail_all(self, entries: Iterable[Entry], message: str | None) -> None:
        for entry in entries:
            if not entry.refused and not entry.again:
                self._context.spawn(self._fail(entry, message))

    async def _why_not(self) -> str:
        if self.phase == "lost":
            return await self._lost()
        if self.phase == "failed":
            return f"this training run could not be created: {self._why_failed or 'see its create request'}"
        if self.row.state == "copy":
            return (
                "this training run holds a copy of weights and cannot be trained on; create a training client"
                " from it with create_training_client_from_state()"
            )
        if self.phase == "closed":
            return f"the session of this training run {self._end}; create a new training client"
        if self.phase == "fresh":
            return "this training run has not been created yet"
        return f"this training run exists already ({self.row.id})"

    async def _lost(self) -> str:
        """What has happened, and the newest state that can be had back."""
        if self._lost_message is None:
            remedy = await replay.remedy(self._context, self.row)
            self._lost_message = (
                "the state of this training run was in the memory of an engine that stopped, and is lost,"
                f" since its log cannot be replayed: {self._why_lost}; {remedy}"
            )
        return self._lost_message


def _snapshot_of(row: RunRow) -> Base | None:
    if row.snapshot is None or row.snapshot_seq is None:
        return None
    return Base(row.snapshot, row.snapshot_seq)


def _phase_of(row: RunRow) -> Phase:
    """The phase of a run that no engine of this life has held yet."""
    if row.lost is not None:
        return "lost"
    if row.state == "failed":
        return "failed"
    if row.state == "fresh":
        return "fresh"
    if row.state == "copy":
        return "closed"
    return "away" if row.snapshot is not None else "crashed"
