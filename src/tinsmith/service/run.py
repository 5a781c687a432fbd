"""One training run: its commands in order, and where its state is.

A run is in one of these phases:

    fresh   its create command has not been carried out yet
    live    an engine holds its state
    away    its whole state lies in a snapshot; the next command brings it back
    lost    the engine that held it died; nothing but a checkpoint is left
    failed  it could not be created
    closed  its session has finished

Commands are handed to the engine in seq_id order, each as soon as its predecessor was handed over:
the engine keeps the order, and sees early what is coming. What a command *does* is in steps.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Literal

from tinsmith.engine.commands import Category, Done, EngineLost, Failed, Reply
from tinsmith.store import Connection, checkpoints, runs, sessions
from tinsmith.store.runs import RunRow
from tinsmith.store.scope import SERVER

from . import shelf
from .context import Context
from .errors import Refusal
from .futures import Failure, Pending, PendingRequest, Result
from .limits import Reached, Who
from .recorder import Recorder
from .session_status import failure_of_run
from .steps import CREATES, Samplers, Saves, Step, StepMaker

log = logging.getLogger("tinsmith.service.run")

Phase = Literal["fresh", "live", "away", "lost", "failed", "closed"]

_LOOK = 30.0  # seconds after which a command that waits for a limit looks again, if nothing changed before
_WINDOW = 16  # commands of a run that the engine has at once: what a stop has to wait for


@dataclass(slots=True)
class Entry:
    """A logged command on its way to the engine. `body` may have been left in the blob store."""

    seq_id: int
    request: PendingRequest
    kind: str
    encoding: str
    body: bytes | None
    body_key: str | None
    arrived_at: float
    refused: bool = False
    key_id: str = ""


class Run:
    def __init__(
        self,
        context: Context,
        recorder: Recorder,
        row: RunRow,
        samplers: Samplers,
    ) -> None:
        self.row = row
        self._context = context
        self._recorder = recorder
        self._steps = StepMaker(context, row, Saves(), samplers)
        self._phase: Phase = _phase_of(row)
        self._snapshot = row.snapshot
        self.next_seq = 0 if self.phase == "fresh" else (row.snapshot_seq or 0) + 1
        self._waiting: dict[int, Entry] = {}
        self._pump: asyncio.Task[object] | None = None
        self._in_flight = 0
        self._landed = asyncio.Event()
        self._landed.set()
        self._window = asyncio.Semaphore(_WINDOW)
        # Held while a command is handed over, and while the whole state moves in or out.
        self._moving = asyncio.Lock()
        self._held = False
        self._closing = False
        self._paused: Reached | None = None  # the limit that the next command waits for
        self._last_arrival = 0.0
        self._gap_timer: asyncio.TimerHandle | None = None
        self._why_failed = ""
        self._deaths = 0
        self._lost_message: str | None = None

    @property
    def phase(self) -> Phase:
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase = phase
        if phase != "live":
            self._context.limits.leave(self.row.id)

    # Arrival and order

    def arrive(self, entry: Entry) -> None:
        """Take a command that has just been logged."""
        self._last_arrival = asyncio.get_running_loop().time()
        if self.phase in ("lost", "closed"):
            self._context.spawn(self._fail(entry, None))
        elif entry.seq_id < self.next_seq:
            if not entry.refused:
                message = (
                    f"seq_id {entry.seq_id} came after its turn: it was given up"
                    f" {self._context.settings.gap_timeout:g} s after the requests behind it had arrived"
                )
                self._context.spawn(self._fail(entry, message))
        else:
            if entry.body_key is not None and len(self._waiting) >= _WINDOW:
                entry.body = None  # it may wait for long, and lies in the blob store
            self._waiting[entry.seq_id] = entry
            self._go_on()

    def _go_on(self) -> None:
        ready = self.next_seq in self._waiting and not self._held
        if ready and (self._pump is None or self._pump.done()):
            self._pump = self._context.spawn(self._hand_over_all())
        self._watch_for_gap()

    async def _hand_over_all(self) -> None:
        while self.next_seq in self._waiting:
            await self._window.acquire()
            if not await self._room():
                self._window.release()
                break
            async with self._moving:
                if self._held or self.next_seq not in self._waiting:
                    self._window.release()
                    break
                entry = self._waiting.pop(self.next_seq)
                self.next_seq += 1
                if entry.refused:
                    self._window.release()
                else:
                    await self._hand_over(entry)
        self._watch_for_gap()

    async def _room(self) -> bool:
        """Wait until the next command is within all limits. False if it shall not go on any more."""
        limits = self._context.limits
        try:
            while not (self._held or self._closing):
                entry = self._waiting.get(self.next_seq)
                if entry is None or entry.refused:
                    return True
                tokens = entry.kind in ("forward", "forward_backward")
                self._paused = limits.pass_training(self.who(entry.key_id), self.row.id, tokens=tokens)
                if self._paused is None:
                    return True
                await limits.change(min(self._paused.resets_in or _LOOK, _LOOK))
            return False
        finally:
            self._paused = None

    def who(self, key_id: str) -> Who:
        row = self.row
        return Who(row.org_id, row.project_id, row.session_id, row.user_id, key_id)

    def waits_for(self, seq_id: int) -> bool:
        """Whether requests have come that stand behind this one, which has not."""
        return self.next_seq <= seq_id < max(self._waiting, default=0)

    def _watch_for_gap(self) -> None:
        if self._gap_timer is not None:
            self._gap_timer.cancel()
            self._gap_timer = None
        if self._waiting and self.next_seq not in self._waiting and not self._held:
            loop = asyncio.get_running_loop()
            due = self._last_arrival + self._context.settings.gap_timeout
            self._gap_timer = loop.call_at(max(due, loop.time()), self._give_up_gap)

    def _give_up_gap(self) -> None:
        """The missing number counts as refused; those that waited for it fail, and later ones go on."""
        missing = self.next_seq
        behind, self._waiting = self._waiting, {}
        self.next_seq = max(behind) + 1
        log.warning("run %s: seq_id %d never came; %d behind it fail", self.row.id, missing, len(behind))
        message = (
            f"seq_id {missing} of this training run never arrived, and this request waited behind it for"
            f" {self._context.settings.gap_timeout:g} s; {missing} counts as refused, and the run goes on"
            f" with seq_id {self.next_seq}"
        )
        for entry in behind.values():
            if not entry.refused:
                self._context.spawn(self._fail(entry, message))
        if self.phase == "away":
            self._context.spawn(shelf.note(self._context, self.row, self._snapshot, self.next_seq - 1))

    def pending(self) -> Pending:
        """Why a request of this run is not done yet."""
        if not self._context.engine.ready:
            return Pending("paused_capacity", "the engine is starting")
        if self._paused is not None:
            return Pending("paused_rate_limit", str(self._paused))
        if self._waiting and self.next_seq not in self._waiting:
            return Pending("active", f"waiting for the request with seq_id {self.next_seq}")
        return Pending()

    # Handing a command to the engine

    async def _hand_over(self, entry: Entry) -> None:
        step: Step | None = None
        try:
            if self.phase == "away":
                await self._bring_back()
            if (self.phase == "fresh") != (entry.kind in CREATES) or self.phase not in ("fresh", "live"):
                raise Refusal(await self._why_not())
            body = entry.body
            if body is None:
                assert entry.body_key is not None
                body = await asyncio.to_thread(self._context.blobs.get, entry.body_key)
            step = await self._steps.make(entry.kind, entry.seq_id, body, entry.encoding, entry.arrived_at)
            if self.phase not in ("fresh", "live"):  # the engine died meanwhile
                raise Refusal(await self._why_not())
        except Refusal as refusal:
            category: Category = "server" if self.phase == "lost" else "user"
            self._leave_unless_live()
            await self._not_done(entry, step, Failure(str(refusal), category))
        except EngineLost:
            self._leave_unless_live()
            await self._not_done(entry, None, Failure(_ENGINE_STOPPED, "server"))
        except Exception as error:
            log.exception("run %s: seq_id %d could not be prepared", self.row.id, entry.seq_id)
            self._leave_unless_live()
            await self._not_done(entry, None, Failure(f"the server failed: {error}", "server"))
        else:
            # From here on there is no wait until the engine has it, so the order is that of the log.
            entry.body = None
            self.phase = "live"
            replies = [self._context.engine.submit(command) for command in step.commands]
            self._in_flight += 1
            self._landed.clear()
            self._context.spawn(self._complete(entry, step, replies))

    def _leave_unless_live(self) -> None:
        """Give up the place among the concurrent runs that was taken for a run that is not held after all."""
        if self.phase != "live":
            self._context.limits.leave(self.row.id)

    async def _complete(self, entry: Entry, step: Step, replies: list[Awaitable[Reply]]) -> None:
        try:
            reply: Reply | None = None
            failed: Failed | None = None
            for each in replies:
                reply = await each
                if each is replies[0]:
                    started = reply.times.get("started")
                    self._context.traces.started(entry.request.request_id, started)
                if isinstance(reply, Failed) and failed is None:
                    failed = reply
            if failed is not None:
                await self._not_done(entry, step, Failure(failed.message, failed.category), handed=True)
            else:
                assert isinstance(reply, Done)
                await self._done(entry, step, reply)
        except EngineLost:
            self._become_lost()
            await self._not_done(entry, step, Failure(await self._lost(), "server"), handed=True)
        except Exception as error:
            log.exception("run %s: seq_id %d failed", self.row.id, entry.seq_id)
            await self._not_done(entry, step, Failure(f"the server failed: {error}", "server"), handed=True)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._landed.set()

    async def _done(self, entry: Entry, step: Step, done: Done) -> None:
        outcome = Result(step.answer(done))
        extra: Callable[[Connection], object] | None = None
        if (commit := step.commit) is not None:
            extra = lambda connection: commit(connection, done)  # noqa: E731
        who = self.who(entry.key_id)
        used = self._context.meter.entries(who, self.row.base_model, done.usage)
        self._context.limits.used_tokens(who, sum(done.usage.values()))
        committed = await self._recorder.record(entry.request, outcome, done.usage, extra, used)
        self._window.release()
        if step.then is not None:
            step.then(committed)

    async def _not_done(
        self, entry: Entry, step: Step | None, failure: Failure, *, handed: bool = False
    ) -> None:
        if step is not None and step.undo is not None:
            step.undo()
        extra: Callable[[Connection], object] | None = None
        if entry.kind in CREATES:
            self.phase, self._why_failed = "failed", failure.message
            extra = lambda connection: runs.set_state(connection, self.row.id, "failed")  # noqa: E731
            if handed and step is not None and len(step.commands) > 1:
                self._context.spawn(shelf.release(self._context, self.row))
        self._window.release()
        await self._recorder.record(entry.request, failure, {}, extra)

    async def _fail(self, entry: Entry, message: str | None) -> None:
        failure = Failure(message or await self._why_not(), "user" if message else "server")
        await self._recorder.record(entry.request, failure, {}, None)

    async def fail_after_restart(self, request: PendingRequest) -> None:
        """A command of an earlier life, of which nobody knows whether it was carried out."""
        message = (
            await self._why_not()
            if self.phase in ("lost", "failed", "closed")
            else "the server stopped before the result of this request was written down"
        )
        await self._recorder.record(request, Failure(message, "server"), {}, None)

    # The engine's death, and messages that say what to do now

    def engine_lost(self) -> None:
        """The engine has died. What it held of this run is gone."""
        self._deaths += 1
        self._become_lost()
        if self.phase == "lost":
            behind, self._waiting = self._waiting, {}
            for entry in behind.values():
                self._context.spawn(self._fail(entry, None))

    def _become_lost(self) -> None:
        if self.phase == "live":
            self.phase = "lost"
            message = "the engine that held this training run stopped, and its state is lost"
            failure = failure_of_run(self.row.id, "server", message)
            self._context.store.write_soon(
                lambda connection: sessions.failed(connection, self.row.session_id, failure, lost=True)
            )

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
            return "the session of this training run has finished; create a new training client"
        if self.phase == "fresh":
            return "this training run has not been created yet"
        return f"this training run exists already ({self.row.id})"

    async def _lost(self) -> str:
        """What has happened, and the newest state that can be had back."""
        if self._lost_message is None:
            newest = await self._context.store.read(
                lambda connection: checkpoints.newest(
                    connection, self.row.id, "training", SERVER, time.time()
                )
            )
            remedy = (
                f"its newest checkpoint is {newest.path} (after seq_id {newest.seq_id}): go on from"
                f' there with create_training_client_from_state_with_optimizer("{newest.path}")'
                if newest is not None
                else "it has no checkpoint: create a new training client, and call save_state now and then"
            )
            self._lost_message = (
                "the state of this training run was in the memory of an engine that stopped, and is lost;"
                f" {remedy}"
            )
        return self._lost_message

    # Moving the whole state out and in

    async def put_away(self) -> None:
        """Put the run's state into a snapshot and free the engine's memory. Nothing is lost."""
        async with self._moving:
            if self.phase != "live" or not self._context.engine.ready:
                return
            await self._landed.wait()
            if self.phase != "live":
                return
            with contextlib.suppress(EngineLost):
                key = await shelf.put_away(self._context, self.row, self.next_seq - 1)
                if key is not None:
                    self.phase, self._snapshot = "away", key

    async def _bring_back(self) -> None:
        """Load the snapshot. It is given up in the moment before the first command that outdates it."""
        key = self._snapshot
        assert key is not None
        before = self.next_seq - 2  # the place before the command that is being handed over
        for attempt in range(_ATTEMPTS):
            deaths = self._deaths
            try:
                await shelf.bring_back(self._context, self.row, key, before)
            except EngineLost:
                if attempt + 1 == _ATTEMPTS:
                    raise
                continue
            await shelf.note(self._context, self.row, None, None)
            if deaths == self._deaths:
                break
            # The engine died in this very moment: the snapshot is what there is.
            await shelf.note(self._context, self.row, key, before)
        else:
            raise EngineLost(_ENGINE_STOPPED)
        self.phase, self._snapshot = "live", None
        self._context.spawn(asyncio.to_thread(self._context.blobs.delete, key))

    async def close(self) -> None:
        """The session has finished: what has arrived is carried out, unless it waits for a limit; then the
        memory is freed."""
        self._closing = True
        self._context.limits.wake()
        async with self._moving:
            pass
        while self._pump is not None and not self._pump.done():
            await asyncio.wait({self._pump})
        self._held = True
        await self._landed.wait()
        if self.phase == "live":
            await shelf.release(self._context, self.row)
        if self.phase in ("live", "away", "fresh"):
            self.phase = "closed"
        behind, self._waiting = self._waiting, {}
        self._watch_for_gap()
        for entry in behind.values():
            await self._fail(entry, None)

    def move(self, project_id: str) -> None:
        """Its session was put into another project."""
        self.row = self._steps.run = replace(self.row, project_id=project_id)
        self._context.limits.moved(self.row.id, project_id)

    def hold(self) -> None:
        """Hand no more over: the server stops. What waits is in the log, and goes on after the start."""
        self._held = True
        self._context.limits.wake()
        self._watch_for_gap()

    @property
    def busy(self) -> bool:
        """Whether something of this run is under way, or could go on at once."""
        return self._in_flight > 0 or (self.next_seq in self._waiting and self._paused is None)

    @property
    def lost(self) -> bool:
        return self.phase == "lost"


_ATTEMPTS = 3  # at bringing a run back, where the engine dies meanwhile
_ENGINE_STOPPED = "the engine stopped again and again while this training run was brought back; try again"


def _phase_of(row: RunRow) -> Phase:
    """The phase of a run that no engine of this life has held yet."""
    if row.state == "failed":
        return "failed"
    if row.state == "fresh":
        return "fresh"
    if row.state == "copy":
        return "closed"
    return "away" if row.snapshot is not None else "lost"


def encode(values: dict[str, object]) -> bytes:
    """A command's own form of its request, as it is logged."""
    return json.dumps(values, separators=(",", ":")).encode()
