"""A run's way back after the engine's death: what replay.py has found is put in place and begun."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

from tinsmith.engine.commands import EngineLost
from tinsmith.store import Connection, commands, runs, sessions
from tinsmith.store.scope import SERVER

from . import replay, shelf
from .errors import Refusal
from .futures import Failure, PendingRequest
from .replay import MOST_FALLS, Irreproducible
from .run_state import RunState
from .session_status import failure_of_run

log = logging.getLogger("tinsmith.service.run")


class Recovery(RunState, ABC):
    _deaths = 0

    def engine_lost(self) -> None:
        """The engine has died. What it held of this run comes back in a replay: at once where something is
        under way, else with the next command."""
        self._deaths += 1
        if self.phase == "live":
            self.phase = "crashed"
            if self._in_flight or self._replay.under_way:
                self._replay.want()
            self._go_on()

    async def _rewind(self) -> None:
        """Have the engine hold the newest state that lies on the disk, and begin anew behind it."""
        await self._landed.wait()
        plan = await replay.plan(self._context, self._recorder, self.row, self._snapshot)
        deaths = self._deaths
        try:
            if plan.why_not is not None:
                raise Irreproducible(plan.why_not)
            await replay.begin(self._context, self.row, plan.base)
        except EngineLost:
            self._replay.falls[plan.base.seq_id] += 1
            if deaths == self._deaths:
                self._held = True  # no other engine will come; what waits is in the log, for the next start
            elif self._replay.falls[plan.base.seq_id] >= MOST_FALLS:
                self._become_lost("the engine died again and again while it was brought back")
            return
        except Irreproducible as error:
            self._become_lost(str(error))
            return
        except Refusal as refusal:
            await self._not_replayed(plan, str(refusal))
            return
        if deaths != self._deaths:
            return
        self._replay.falls.pop(plan.base.seq_id, None)
        turn = self._line.turn
        entries = [self._entry(each, "done", suspect=False) for each in plan.again.values()]
        entries += [self._entry(e, "queued", suspect=True) for e in plan.open.values() if e.seq_id < turn]
        self._line.rewind(entries)
        self._replay.begin(plan.again)
        if entries:
            log.info(
                "run %s goes on from seq_id %d: %d commands are replayed, %d are carried out",
                self.row.id, plan.base.seq_id, len(plan.again), len(entries) - len(plan.again),
            )  # fmt: skip
        self.phase = "fresh" if plan.base.key is None else "live"

    async def _not_replayed(self, plan: replay.Plan, message: str) -> None:
        """It cannot be brought back now, but later perhaps. What waits for that fails."""
        self._replay.over()
        self._line.rewind(())
        for each in plan.open.values():
            if each.seq_id < self._line.turn:
                await self._fail(self._entry(each, "queued", suspect=False), message)
        if self._line.head is not None:
            self._fail_all([self._line.pop()], message)

    def _become_lost(self, why: str) -> None:
        if self.phase == "lost":
            return
        if self.phase == "live":
            self._context.spawn(shelf.release(self._context, self.row))
        log.error("run %s is lost: %s", self.row.id, why)
        self.phase, self._why_lost = "lost", why
        self._replay.over()
        message = f"the engine that held this training run stopped, and its state is lost: {why}"
        failure = failure_of_run(self.row.id, "server", message)

        def note(connection: Connection) -> None:
            runs.set_lost(connection, self.row.id, why)
            sessions.failed(connection, self.row.session_id, failure, lost=True)

        self._context.store.write_soon(note)
        self._fail_all(self._line.clear(), None)
        self._context.spawn(self.fail_open())

    async def fail_open(self) -> None:
        """What has no outcome in the log, and is not on its way to one, fails."""
        await self._landed.wait()
        log_ = await self._context.store.read(
            lambda connection: commands.log_of_run(connection, self.row.id, SERVER, queued=True)
        )
        for each in log_:
            await self._fail(self._entry(each, "queued", suspect=False), None)

    async def fail_after_restart(self, request: PendingRequest) -> None:
        """A command of an earlier life, of which nobody knows whether it was carried out."""
        message = "the server stopped before the result of this request was written down"
        await self._recorder.record(request, Failure(message, "server"), {}, None)

    async def revive(self) -> None:
        """Bring the run back if it has crashed, and wait until that is done or given up."""
        if self.phase == "crashed":
            self._replay.want()
            self._go_on()
        await self._replay.ended.wait()

    async def will_publish(self, seq_id: int) -> bool:
        """Whether a replay publishes again what this command has published."""
        if self.phase == "crashed":
            plan = await replay.plan(self._context, self._recorder, self.row, self._snapshot)
            return plan.why_not is None and seq_id in plan.again
        return self._replay.under_way and seq_id in self._replay.again

    @abstractmethod
    def _go_on(self) -> None:
        """Hand over what can be handed over."""
