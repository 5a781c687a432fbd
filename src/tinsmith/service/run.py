"""One training run: its commands in order, from their arrival to their outcomes.

Commands are handed to the engine in seq_id order, each as soon as its predecessor was handed over:
the engine keeps the order, and sees early what is coming. What a command *does* is in steps.py. For a replay
the order begins anew, behind the state that replay.py finds: what was done is handed over once more, marked
`again`, and what has no outcome as if for the first time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from tinsmith.engine.commands import Category, Done, EngineLost, Failed, Reply
from tinsmith.store import Connection, commands, runs
from tinsmith.store.commands import Logged
from tinsmith.store.runs import RunRow

from . import shelf
from .company import DEADLY, IN_COMPANY, MOST_LIVES, Company
from .context import Context
from .errors import Refusal
from .futures import Failure, Pending, Result
from .keeping import Keeping
from .limits import Reached, Who
from .line import Entry
from .recorder import Recorder
from .replay import MOST_FALLS
from .steps import CREATES, Samplers, Saves, Step, StepMaker

log = logging.getLogger("tinsmith.service.run")

_LOOK = 30.0  # seconds after which a command that waits for a limit looks again, if nothing changed before
_WINDOW = 16  # commands of a run that the engine has at once: what a stop has to wait for


class Run(Keeping):
    def __init__(
        self,
        context: Context,
        recorder: Recorder,
        row: RunRow,
        samplers: Samplers,
        company: Company,
    ) -> None:
        super().__init__(context, recorder, row)
        self._company = company
        self._steps = StepMaker(context, row, Saves(), samplers)
        self._pump: asyncio.Task[object] | None = None
        self._window = asyncio.Semaphore(_WINDOW)
        self._closing = False
        self._paused: Reached | None = None  # the limit that the next command waits for
        self._last_arrival = 0.0
        self._gap_timer: asyncio.TimerHandle | None = None

    # Arrival and order

    def arrive(self, entry: Entry) -> None:
        """Take a command that has just been logged."""
        self._last_arrival = asyncio.get_running_loop().time()
        if self.phase in ("lost", "closed"):
            self._context.spawn(self._fail(entry, None))
        elif entry.seq_id < self._line.turn:
            if not entry.refused:
                self._context.spawn(self._fail(entry, self.too_late(entry.seq_id)))
        else:
            if entry.body_key is not None and len(self._line) >= _WINDOW:
                entry.body = None  # it may wait for long, and lies in the blob store
            self._line.put(entry)
            self._go_on()

    def too_late(self, seq_id: int) -> str | None:
        """Why a command that comes now cannot be carried out any more, if that is so."""
        if seq_id >= self._line.turn or self.phase in ("lost", "closed", "failed"):
            return None
        return (
            f"seq_id {seq_id} came after its turn: it was given up"
            f" {self._context.settings.gap_timeout:g} s after the requests behind it had arrived"
        )

    def take_up(self, log: Sequence[Logged]) -> None:
        """Go on with what the log has from an earlier life of the server, where the run can."""
        if self.phase not in ("fresh", "away", "crashed"):
            return
        self._last_arrival = asyncio.get_running_loop().time()
        done = max((each.seq_id for each in log if each.status == "done"), default=-1)
        if self.phase != "fresh":
            self._line.skip_to(done + 1)
            if done > (-1 if self._snapshot is None else self._snapshot.seq_id):
                self.phase = "crashed"
        queued = 0
        for each in log:
            if each.status == "queued" or each.seq_id >= self._line.next_seq:
                # Any of the first ones may have been at the engine.
                queued += each.status == "queued"
                entry = self._entry(each, each.status, suspect=queued <= _WINDOW)
                if each.seq_id >= self._line.next_seq:
                    self._line.put(entry)
                else:
                    self._replay.want()
        self._go_on()

    def _go_on(self) -> None:
        ready = (self._line.head is not None or self._replay.wanted) and not self._held
        if ready and (self._pump is None or self._pump.done()):
            self._pump = self._context.spawn(self._hand_over_all())
        self._watch_for_gap()

    async def _hand_over_all(self) -> None:
        while self._line.head is not None or self._replay.wanted:
            await self._window.acquire()
            handed = False
            try:
                if not await self._room():
                    break
                async with self._moving:
                    if self._held:
                        break
                    if self.phase in ("away", "crashed"):
                        await self._rewind()
                    elif (entry := self._line.head) is not None and await self._may_begin(entry):
                        self._line.pop()
                        handed = not entry.refused and await self._hand_over(entry)
                    elif entry is None:
                        self._replay.over()
            finally:
                if not handed:
                    self._window.release()
        self._watch_for_gap()

    async def _room(self) -> bool:
        """Wait until the next command is within all limits. False if it shall not go on any more."""
        limits = self._context.limits
        try:
            while not (self._held or self._closing):
                entry = self._line.head
                if entry is None or entry.refused or (entry.again and self.phase == "live"):
                    return True
                tokens = entry.kind in ("forward", "forward_backward") and not entry.again
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
        return self._line.turn <= seq_id < self._line.last

    def _watch_for_gap(self) -> None:
        if self._gap_timer is not None:
            self._gap_timer.cancel()
            self._gap_timer = None
        if self._line.gap and not self._held:
            loop = asyncio.get_running_loop()
            due = self._last_arrival + self._context.settings.gap_timeout
            self._gap_timer = loop.call_at(max(due, loop.time()), self._give_up_gap)

    def _give_up_gap(self) -> None:
        """The missing number counts as refused; those that waited for it fail, and later ones go on."""
        missing = self._line.next_seq
        behind = self._line.clear()
        turn = self._line.next_seq
        log.warning("run %s: seq_id %d never came; %d behind it fail", self.row.id, missing, len(behind))
        message = (
            f"seq_id {missing} of this training run never arrived, and this request waited behind it for"
            f" {self._context.settings.gap_timeout:g} s; {missing} counts as refused, and the run goes on"
            f" with seq_id {turn}"
        )
        self._fail_all(behind, message)
        self._context.store.write_soon(lambda connection: runs.set_turn(connection, self.row.id, turn - 1))

    def pending(self) -> Pending:
        """Why a request of this run is not done yet."""
        if not self._context.engine.ready:
            return Pending("paused_capacity", "the engine is starting")
        if self._paused is not None:
            return Pending("paused_rate_limit", str(self._paused))
        if self._replay.under_way:
            return Pending("paused_capacity", str(self._replay))
        if self._line.gap:
            return Pending("active", f"waiting for the request with seq_id {self._line.next_seq}")
        return Pending()

    # Handing a command to the engine

    async def _may_begin(self, entry: Entry) -> bool:
        """Whether the command whose turn it is may be handed over. If not, something else has happened."""
        if entry.again:
            self._replay.redoing = True
            if (falls := self._replay.falls[entry.seq_id]) >= MOST_FALLS:
                self._become_lost(
                    f"the engine died {falls} times while the request with seq_id {entry.seq_id} was replayed"
                )
            return self.phase != "lost"
        if self._replay.redoing:
            # Nothing new is built upon a state before that is known to be what it was.
            await self._landed.wait()
            if self.phase not in ("fresh", "live"):
                return False
            self._replay.redoing = False
        falls = self._replay.falls[entry.seq_id]
        if falls >= DEADLY or entry.attempts >= MOST_LIVES:
            self._line.pop()
            what, times = ("engine", falls) if falls >= DEADLY else ("server", entry.attempts)
            message = (
                f"the {what} died {times} times while this request was carried out, the last time with no"
                " other training request beside it; it is given up and has changed nothing, and the run goes"
                " on without it"
            )
            log.error("%s: %s", entry.request.request_id, message)
            await self._not_done(entry, None, Failure(message, "server"))
            return False
        return True

    async def _hand_over(self, entry: Entry) -> bool:
        """Whether the engine has it; then it ends in _complete."""
        falls = self._replay.falls[entry.seq_id]
        alone = not entry.again and (falls >= IN_COMPANY or entry.attempts > MOST_LIVES // 2)
        step: Step | None = None
        handed = False
        await self._company.enter(alone=alone)
        try:
            step = await self._make_step(entry)
            await self._note_begin(entry, step)
            if self.phase not in ("fresh", "live"):
                raise Refusal(await self._why_not())
        except Exception as error:
            if self.phase == "crashed":  # whatever it was: its turn comes in the replay
                await _undo(step)
                self._line.put_back(entry)
            else:
                await self._not_handed(entry, step, error)
        else:
            # From here on there is no wait until the engine has it, so the order is that of the log.
            entry.body, handed = None, True
            self.phase = "live"
            replies = [self._context.engine.submit(command) for command in step.commands]
            self._fly(self._complete(entry, step, replies, alone))
            if entry.kind == "optim_step" and self._snapshots.due:
                self._take_snapshot(entry.seq_id)
        finally:
            if not handed:
                await self._company.leave(alone=alone)
        return handed

    async def _note_begin(self, entry: Entry, step: Step) -> None:
        """Write down what a replay must know of a command before the engine has it."""
        request_id, loads = entry.request.request_id, step.loads
        if loads is not None and entry.loaded is None and self.phase != "crashed":
            await self._context.store.write(lambda c: commands.set_loaded(c, request_id, loads))
        if entry.suspect:
            await self._context.store.write(lambda c: commands.begin_again(c, request_id))

    async def _make_step(self, entry: Entry) -> Step:
        if (self.phase == "fresh") != (entry.kind in CREATES) or self.phase not in ("fresh", "live"):
            raise Refusal(await self._why_not())
        if entry.kind in CREATES:
            shelf.check_base(self._context, self.row)
        body = entry.body
        if body is None and entry.body_key is not None:
            body = await asyncio.to_thread(self._context.blobs.get, entry.body_key)
        elif body is None:
            request_id = entry.request.request_id
            body = await self._context.store.read(lambda connection: commands.body(connection, request_id))
        return await self._steps.make(
            entry.kind, entry.seq_id, body or b"", entry.encoding, entry.arrived_at, entry.loaded,
            again=entry.again,
        )  # fmt: skip

    async def _not_handed(self, entry: Entry, step: Step | None, error: Exception) -> None:
        category: Category = "user" if self.phase != "lost" else "server"
        message = str(error)
        if not isinstance(error, Refusal):
            log.error("run %s: seq_id %d could not be prepared", self.row.id, entry.seq_id, exc_info=error)
            category, message = "server", f"the server failed: {error}"
        if entry.again:
            self._become_lost(_diverged(entry, message))
            return
        if self.phase != "live":  # the place among the concurrent runs was taken for nothing
            self._context.limits.leave(self.row.id)
        await self._not_done(entry, step, Failure(message, category))

    async def _complete(self, entry: Entry, step: Step, replies: list[Awaitable[Reply]], alone: bool) -> None:
        try:
            reply: Reply | None = None
            failed: Failed | None = None
            for each in replies:
                reply = await each
                if each is replies[0]:
                    started = reply.times.get("started")
                    self._context.traces.started(entry.request.request_id, started)
                    self._snapshots.worked(started, time.time())
                if isinstance(reply, Failed) and failed is None:
                    failed = reply
            if entry.again:
                self._done_again(entry, step, failed)
            elif failed is not None:
                await self._not_done(entry, step, Failure(failed.message, failed.category), handed=True)
            else:
                assert isinstance(reply, Done)
                self._replay.falls.pop(entry.seq_id, None)  # whatever the engine has died of, it was not this
                await self._done(entry, step, reply)
        except EngineLost:  # its outcome comes from the replay
            self._replay.falls[entry.seq_id] += 1
            await _undo(step)
        except Exception as error:
            log.exception("run %s: seq_id %d failed", self.row.id, entry.seq_id)
            await self._not_done(entry, step, Failure(f"the server failed: {error}", "server"), handed=True)
        finally:
            self._window.release()
            await self._company.leave(alone=alone)

    async def _done(self, entry: Entry, step: Step, done: Done) -> None:
        outcome = Result(step.answer(done))
        extra: Callable[[Connection], object] | None = None
        if (commit := step.commit) is not None:
            extra = lambda connection: commit(connection, done)  # noqa: E731
        who = self.who(entry.key_id)
        used = self._context.meter.entries(who, self.row.base_model, done.usage)
        self._context.limits.used_tokens(who, sum(done.usage.values()))
        committed = await self._recorder.record(entry.request, outcome, done.usage, extra, used)
        if step.then is not None:
            step.then(committed)

    def _done_again(self, entry: Entry, step: Step, failed: Failed | None) -> None:
        if failed is not None:
            self._become_lost(_diverged(entry, failed.message))
            return
        self._replay.advance(entry.seq_id)
        if entry.kind == "save_weights_for_sampler" and step.then is not None:
            step.then(None)

    async def _not_done(
        self, entry: Entry, step: Step | None, failure: Failure, *, handed: bool = False
    ) -> None:
        await _undo(step)
        extra: Callable[[Connection], object] | None = None
        if entry.kind in CREATES:
            self.phase, self._why_failed = "failed", failure.message
            extra = lambda connection: runs.set_state(connection, self.row.id, "failed")  # noqa: E731
            if handed and step is not None and len(step.commands) > 1:
                self._context.spawn(shelf.release(self._context, self.row))
        await self._recorder.record(entry.request, failure, {}, extra)

    async def close(self, end: str, *, at_once: bool = False) -> None:
        """The session has finished, as `end` says: what is under way is carried out (`at_once`: what the
        engine has of it), then the memory is freed."""
        self._end = end
        self._closing = True
        self._held |= at_once
        self._context.limits.wake()
        async with self._moving:
            pass
        while self._pump is not None and not self._pump.done():
            await asyncio.wait({self._pump})
        self._held = True
        await self._landed.wait()
        if self.phase == "live":
            await shelf.release(self._context, self.row)
        if self.phase in ("live", "away", "crashed", "fresh"):
            self.phase = "closed"
        self._replay.over()
        behind = self._line.clear()
        self._watch_for_gap()
        for entry in behind:
            if not entry.refused and not entry.again:
                await self._fail(entry, None)
        await self.fail_open()

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
        waits = self._line.head is not None or self._replay.wanted
        return bool(self._in_flight) or (waits and not self._held and self._paused is None)

    @property
    def lost(self) -> bool:
        return self.phase == "lost"


async def _undo(step: Step | None) -> None:
    if step is not None and step.undo is not None:
        await step.undo()


def _diverged(entry: Entry, message: str) -> str:
    return f"the request with seq_id {entry.seq_id} was done, and failed when it was replayed: {message}"


def encode(values: dict[str, object]) -> bytes:
    """A command's own form of its request, as it is logged."""
    return json.dumps(values, separators=(",", ":")).encode()
