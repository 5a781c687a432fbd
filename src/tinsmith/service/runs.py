"""All training runs: logging what they are asked, finding them, and their beginnings and ends."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, replace
from functools import partial

from tinsmith.store import Connection, commands, runs
from tinsmith.store.commands import CommandRow
from tinsmith.store.runs import RunRow
from tinsmith.store.samplers import SamplingSessionRow
from tinsmith.store.scope import SERVER, Scope
from tinsmith.wire.requests import Target

from .caller import Caller
from .company import Company
from .context import Context
from .errors import NotFound, OverBudget, Unwritable
from .futures import Failure, Outcome, Pending, PendingRequest
from .line import Entry
from .recorder import INLINE, Recorder, note_failure
from .run import Run
from .sessions import Sessions
from .steps import Samplers

log = logging.getLogger("tinsmith.service.runs")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a submission is answered: where its outcome will be."""

    request_id: str
    model_id: str | None = None


class Runs:
    def __init__(self, context: Context, sessions: Sessions, samplers: Samplers) -> None:
        self._context = context
        self._sessions = sessions
        self._samplers = samplers
        self._recorder = Recorder(context)
        self._company = Company()
        self._runs: dict[str, Run] = {}
        self._used: dict[str, float] = {}
        sessions.on_finish.append(self._session_finished)
        sessions.on_silence.append(self._session_silent)
        sessions.on_move.append(self._session_moved)
        samplers.revivable, samplers.revive = self._revivable, self._revive
        context.engine.on_lost(self._engine_lost)

    # Into the log

    async def create(self, row: RunRow, kind: str, body: bytes, refusal: str | None, key_id: str) -> Receipt:
        """A new run, whose command 0 makes it; or the one that is there already."""
        if refusal is not None:
            row = replace(row, state="failed")
        command = self._command(row, 0, kind, body, refusal, key_id=key_id)

        def write(connection: Connection) -> bool:
            if not runs.add(connection, row):
                return False
            commands.add(connection, command)
            self._note(connection, command)
            return True

        async def create() -> None:
            if await self._context.write(write):
                self._trace(row, command, body)
                self._accept(self._make(row), command)

        await asyncio.shield(self._context.spawn(create()))
        return Receipt(command.request_id, row.id)

    async def submit(
        self, caller: Caller, target: Target, kind: str, body: bytes, encoding: str, refusal: str | None
    ) -> Receipt:
        """A command of a run. With a `refusal` it takes its place there, and fails with it."""
        run = await self.get(caller, target.model_id)
        caller.require(run.row.project_id, "work")
        self._sessions.seen(run.row.session_id)
        self._used[run.row.id] = time.time()
        if kind in ("forward", "forward_backward") and refusal is None:
            await self._check_budget(caller, run, target.seq_id)
        # A client that goes away in the middle must not leave a logged command that never arrives.
        work = self._log(run, target.seq_id, kind, body, encoding, refusal, caller.key_id)
        return Receipt(await asyncio.shield(self._context.spawn(work)), run.row.id)

    async def _check_budget(self, caller: Caller, run: Run, seq_id: int) -> None:
        """Raises OverBudget for work that would begin now. What is logged already has its answer, and a
        call of which other chunks have been taken goes on: its client would wait for it for ever."""
        try:
            self._context.limits.check_spend(run.who(caller.key_id))
        except OverBudget:
            request_id = f"{run.row.id}:{seq_id}"
            if run.waits_for(seq_id) or self._recorder.find(request_id) is not None:
                return
            logged = await self._context.store.read(
                lambda connection: commands.by_request(connection, request_id, caller.scope())
            )
            if logged is None:
                raise

    async def _log(
        self,
        run: Run,
        seq_id: int,
        kind: str,
        body: bytes,
        encoding: str,
        refusal: str | None,
        key_id: str,
    ) -> str:
        if refusal is None:
            refusal = run.too_late(seq_id)
        command = self._command(run.row, seq_id, kind, body, refusal, encoding, key_id)
        if self._recorder.find(command.request_id) is not None:
            return command.request_id
        try:
            if command.body_key is not None:
                await asyncio.to_thread(self._context.blobs.put, command.body_key, body)
            taken = await self._context.write(lambda connection: self._add(connection, command))
        except (Unwritable, OSError) as error:
            # An HTTP error would leave the SDK waiting for the chunks behind this one. What could not be
            # logged has its place and its outcome in memory alone.
            log.error("%s could not be logged: %s", command.request_id, error)
            why = error if isinstance(error, Unwritable) else Unwritable(error)
            self._recorder.expect(PendingRequest(command.request_id)).resolve(Failure(why.detail, "server"))
            self._accept(run, replace(command, status="failed", error=why.detail))
            return command.request_id
        if taken is None:
            self._trace(run.row, command, body)
            self._accept(run, command, body)
        elif command.body_key is not None:
            await asyncio.to_thread(self._context.blobs.delete, command.body_key)
        return taken or command.request_id

    def _add(self, connection: Connection, command: CommandRow) -> str | None:
        taken = commands.add(connection, command)
        if taken is None:
            self._note(connection, command)
        return taken

    @staticmethod
    def _note(connection: Connection, command: CommandRow) -> None:
        """Where it is refused, its session is told."""
        if command.error is not None:
            note_failure(
                connection, command.request_id, command.kind, command.category or "server", command.error
            )

    def _trace(self, row: RunRow, command: CommandRow, body: bytes) -> None:
        self._context.traces.accepted(
            row.org_id, row.session_id, command.request_id, command.kind, row.id, len(body)
        )

    def _command(
        self,
        run: RunRow,
        seq_id: int,
        kind: str,
        body: bytes,
        refusal: str | None,
        encoding: str = "identity",
        key_id: str | None = None,
    ) -> CommandRow:
        now = time.time()
        return CommandRow(
            org_id=run.org_id,
            run_id=run.id,
            seq_id=seq_id,
            request_id=f"{run.id}:{seq_id}",
            kind=kind,
            body=body if len(body) <= INLINE else None,
            body_key=f"bodies/{uuid.uuid4().hex}" if len(body) > INLINE else None,
            encoding=encoding,
            arrived_at=now,
            status="queued" if refusal is None else "failed",
            error=refusal,
            category="user" if refusal is not None else None,
            finished_at=now if refusal is not None else None,
            key_id=key_id,
        )

    def _accept(self, run: Run, command: CommandRow, body: bytes | None = None) -> None:
        run = self._runs.setdefault(run.row.id, run)
        request = PendingRequest(command.request_id)
        refused = command.status != "queued"
        if refused:
            request.resolve(Failure(command.error or "refused"))
            self._context.traces.ended(command.request_id, "failed", {})
        else:
            request = self._recorder.expect(request)
        run.arrive(
            Entry(
                seq_id=command.seq_id,
                request=request,
                kind=command.kind,
                encoding=command.encoding,
                body=body if body is not None else command.body,
                body_key=command.body_key,
                arrived_at=command.arrived_at,
                refused=refused,
                key_id=command.key_id or "",
            )
        )

    # Finding runs, and outcomes

    async def get(self, caller: Caller, run_id: str) -> Run:
        run = await self._find(run_id, caller.scope())
        if run is None:
            raise NotFound(f"model_id: there is no training run {run_id[:120]!r}")
        return run

    async def _find(self, run_id: str, scope: Scope) -> Run | None:
        known = self._runs.get(run_id)
        if known is not None and scope.sees(known.row):
            return known
        store = self._context.store
        row = await store.read(partial(runs.get, run_id=run_id, scope=scope))
        if row is None:
            return None
        run = self._make(row)
        if (end := await self._sessions.end_of(row.session_id)) is not None:
            run.was_closed(end)
        since = 0 if row.snapshot_seq is None else row.snapshot_seq + 1
        logged = await store.read(partial(commands.log_of_run, run_id=run_id, scope=scope, since=since))
        known = self._runs.setdefault(run_id, run)
        if known is run:
            run.take_up(logged)
        return known

    def _make(self, row: RunRow) -> Run:
        return Run(self._context, self._recorder, row, self._samplers, self._company)

    async def outcome(
        self, caller: Caller, request_id: str, seconds: float, closing: asyncio.Future[None]
    ) -> Outcome | Pending:
        """What became of a training request, waiting for up to `seconds`."""
        request, scope = self._recorder.find(request_id), caller.scope()
        run = self._runs.get(request_id.rpartition(":")[0]) if request is not None else None
        if request is None or run is None or not scope.sees(run.row):
            row = await self._context.store.read(
                lambda connection: commands.by_request(connection, request_id, scope)
            )
            if row is None:
                raise NotFound(f"request_id: there is no request {request_id[:120]!r}")
            outcome: Outcome | None = await self._recorder.read(row)
        else:
            self._sessions.seen(run.row.session_id)
            outcome = await request.wait(seconds, closing)
            if outcome is None:
                return run.pending()
        assert outcome is not None
        self._recorder.was_fetched(request_id)
        return outcome

    # Beginnings and ends

    async def take_up(self) -> None:
        """After a start: what is in the log and can go on, goes on; what cannot, says so."""
        store = self._context.store
        for run_id in await store.read(partial(commands.runs_with_queued, scope=SERVER)):
            run = await self._find(run_id, SERVER)
            assert run is not None
            if run.phase in ("lost", "failed", "closed"):
                await run.fail_open()
                continue
            log_ = await store.read(partial(commands.log_of_run, run_id=run_id, scope=SERVER, queued=True))
            for command in log_:
                if self._recorder.find(command.request_id) is None:
                    request = PendingRequest(command.request_id)
                    await run.fail_after_restart(self._recorder.expect(request))

    async def _revivable(self, row: SamplingSessionRow) -> bool:
        if row.run_id is None or row.seq_id is None:
            return False
        run = await self._find(row.run_id, SERVER)
        return run is not None and await run.will_publish(row.seq_id)

    async def _revive(self, row: SamplingSessionRow) -> None:
        run = await self._find(row.run_id, SERVER) if row.run_id is not None else None
        if run is not None:
            await run.revive()

    def _engine_lost(self, _generation: int) -> None:
        for run in self._runs.values():
            run.engine_lost()

    async def _session_finished(self, session_id: str) -> None:
        end = await self._sessions.end_of(session_id)
        for run in self._of_session(session_id):
            await run.close(end or "has finished", at_once=self._sessions.was_cancelled(session_id))
            self._runs.pop(run.row.id, None)
        # Nothing goes on from here: what was put away is of no use any more.
        for key in await self._context.store.write(partial(runs.drop_snapshots, session_id=session_id)):
            await asyncio.to_thread(self._context.blobs.delete, key)

    def _session_moved(self, session_id: str, project_id: str) -> None:
        for run in self._of_session(session_id):
            run.move(project_id)

    async def _session_silent(self, session_id: str) -> None:
        for run in self._of_session(session_id):
            await run.put_away()

    def _of_session(self, session_id: str) -> list[Run]:
        return [run for run in self._runs.values() if run.row.session_id == session_id]

    async def settle(self, seconds: float) -> None:
        """Let what is under way end, then hold what is not, for the next start."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(run.busy for run in self._runs.values()):
            await asyncio.sleep(0.02)
        for run in self._runs.values():
            run.hold()

    async def put_all_away(self, seconds: float) -> None:
        """Put every run away whole, as far as there is time."""
        work = {asyncio.ensure_future(run.put_away()): run for run in self._runs.values()}
        if work:
            _, late = await asyncio.wait(work, timeout=seconds)
            for task in late:
                task.cancel()
                log.error(
                    "run %s is not done after %g s; it is replayed after the next start",
                    work[task].row.id,
                    seconds,
                )

    def flush(self) -> None:
        self._recorder.flush()
        self._context.traces.flush()
        if self._used:
            used, self._used = self._used, {}
            self._context.store.write_soon(lambda connection: runs.touch(connection, used))
            for run_id, when in used.items():  # rows that are at hand know it, too
                if (run := self._runs.get(run_id)) is not None:
                    run.row = replace(run.row, last_request_at=when)

    def last_used(self, row: RunRow) -> float:
        return max(row.last_request_at, self._used.get(row.id, 0.0))

    def is_lost(self, row: RunRow) -> bool:
        """Whether nothing but checkpoints is known to be left of a run."""
        run = self._runs.get(row.id)
        return run.lost if run is not None else row.lost is not None

    @property
    def pending(self) -> int:
        """How many requests are on their way."""
        return len(self._recorder)

    def counts(self) -> dict[str, int]:
        """How many runs are in which phase."""
        found: dict[str, int] = {}
        for run in self._runs.values():
            found[run.phase] = found.get(run.phase, 0) + 1
        return found
