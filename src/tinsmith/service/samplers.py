"""Sampling sessions, and the weights behind them: which ones the engine holds, and opening the rest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from tinsmith.engine.commands import EngineLost, Failed, ModelInfo, OpenSampler, PutSampler, ReleaseSampler
from tinsmith.store import checkpoints, samplers
from tinsmith.store.checkpoints import CheckpointRow
from tinsmith.store.samplers import SamplingSessionRow
from tinsmith.store.scope import SERVER
from tinsmith.wire.paths import TinkerPath
from tinsmith.wire.requests import CreateSamplingSession

from .audit import AuditLog
from .caller import Caller
from .context import Context
from .errors import NotFound, Refusal, Refused
from .sessions import Sessions
from .steps import Source, find_checkpoint, sampler_of

log = logging.getLogger("tinsmith.service")

_MOST_KEPT = 16  # samplers without a name of a session that are written down at a stop


class Samplers:
    def __init__(self, context: Context, sessions: Sessions, audit: AuditLog) -> None:
        self._context = context
        self._audit = audit
        self._sessions = sessions
        self._rows: dict[str, SamplingSessionRow] = {}
        # Samplers that the engine of this life holds, and those that are being opened.
        self._open: set[str] = set()
        self._opening: dict[str, asyncio.Task[str | None]] = {}
        # See the protocol in steps.py.
        self.revivable: Callable[[SamplingSessionRow], Awaitable[bool]] | None = None
        self.revive: Callable[[SamplingSessionRow], Awaitable[None]] | None = None
        sessions.on_finish.append(self._release_unnamed)
        sessions.on_silence.append(self._release_unnamed)
        context.engine.on_lost(self._engine_lost)

    async def create(self, caller: Caller, request: CreateSamplingSession) -> str:
        await self._sessions.open(caller, request.session_id, "sample")
        row = SamplingSessionRow(
            id=f"{request.session_id}:sample:{request.sampling_session_seq_id}",
            org_id=caller.org_id,
            session_id=request.session_id,
            created_at=time.time(),
            base_model="",
            model_path=request.model_path,
            sampler=None,
            folder=None,
            ephemeral=False,
        )
        row = await self.resolve(caller, row, request.base_model)
        row = await self._context.write(lambda connection: samplers.add(connection, row))
        self._rows[row.id] = row
        if row.model_path is not None:
            self._audit.was_read(caller, TinkerPath.parse(row.model_path), "sampling")
        if row.sampler is not None and not row.ephemeral:
            self.begin_to_open(row)  # so that it is there when the first sample comes
        return row.id

    async def resolve(
        self, caller: Caller, row: SamplingSessionRow, base_model: str | None
    ) -> SamplingSessionRow:
        """Which base model and which weights are meant."""
        if row.model_path is None:
            if base_model is None:
                raise Refused("base_model: is missing, and so is model_path; give one of the two")
            return replace(row, base_model=self.sampleable(base_model).name)
        try:
            path = TinkerPath.parse(row.model_path, "model_path")
            checkpoint, source = await self._find(caller, path)
        except Refusal as refusal:
            raise NotFound(str(refusal).replace("path:", "model_path:", 1)) from None
        model = self.sampleable(base_model or source.base_model)
        _check_base(source, model)
        return replace(
            row, base_model=model.name, sampler=sampler_of(checkpoint.id), folder=checkpoint.folder
        )

    async def _find(self, caller: Caller, path: TinkerPath) -> tuple[CheckpointRow, Source]:
        """Weights to sample from: whatever the caller sees, and in a project where it may only sample,
        what was saved for that."""
        try:
            return await find_checkpoint(self._context, path, caller.scope())
        except Refusal:
            if path.kind != "sampler":
                raise
            return await find_checkpoint(self._context, path, caller.scope("sample"))

    def sampleable(self, name: str) -> ModelInfo:
        model = self._context.model(name)
        if model.not_sampleable:
            raise Refused(f"base_model: {model.name} cannot be sampled from here: {model.not_sampleable}")
        return model

    async def get(self, caller: Caller, id_: str) -> SamplingSessionRow:
        row, scope = self._rows.get(id_), caller.scope()
        if row is not None and self._sessions.at_hand(row.session_id, scope) is not None:
            return row
        row = await self._context.store.read(lambda connection: samplers.get(connection, id_, scope))
        if row is None:
            raise NotFound(f"sampling_session_id: there is no sampling session {id_[:120]!r}")
        return self._rows.setdefault(id_, row)

    async def join(self, caller: Caller, id_: str) -> int:
        row = await self.get(caller, id_)
        caller.require_over(await self._sessions.get(caller, row.session_id))
        return await self._context.write(lambda connection: samplers.next_clone(connection, row.id))

    def published(self, sampler: str) -> None:
        """The engine holds a sampler from now on, because a run has published it."""
        self._open.add(sampler)

    async def why_gone(self, row: SamplingSessionRow) -> str | None:
        """Whether there are no such weights any more, and why: they were held by the engine alone, or their
        checkpoint was deleted, replaced, or its time came."""
        if row.sampler is None or row.sampler in self._open:
            return None
        if row.ephemeral:
            if row.folder is not None and self._context.blobs.path(row.folder).exists():
                return None
            if self.revivable is not None and await self.revivable(row):
                return None
            if row.sampler in self._open:  # it has come back meanwhile
                return None
            return (
                f"the weights of {row.id} were never saved under a name, and went with the engine or the"
                " session that held them; make a new sampling client with"
                " save_weights_and_get_sampling_client(), or from a checkpoint"
            )
        id_ = row.sampler.removeprefix(sampler_of(""))
        now = time.time()
        if await self._context.store.read(
            lambda connection: checkpoints.get(connection, id_, SERVER, now) is not None
        ):
            return None
        return (
            f"{row.model_path} is gone: it was deleted or replaced since this sampling client was made, or"
            " its TTL has ended; make a new sampling client from a checkpoint that there is"
        )

    async def held(self, row: SamplingSessionRow) -> None:
        """Wait until the engine holds weights without a name that a replay brings back. Raises EngineLost
        where it does not."""
        # Inflight ones are there while an earlier command has published them; the newest are meant.
        if row.ephemeral and (row.sampler not in self._open or row.sampler != row.id):
            if self.revive is not None:
                await self.revive(row)
            if row.sampler not in self._open:
                raise EngineLost("the weights did not come back")

    def begin_to_open(self, row: SamplingSessionRow) -> asyncio.Task[str | None] | None:
        """Make the engine know a checkpoint's weights. None where it does."""
        assert row.sampler is not None
        assert row.folder is not None
        if row.sampler in self._open:
            return None
        task = self._opening.get(row.sampler)
        if task is None:
            task = self._opening[row.sampler] = self._context.spawn(
                self._open_sampler(row.sampler, row.base_model, row.folder)
            )
        return task

    async def _open_sampler(self, sampler: str, model: str, folder: str) -> str | None:
        """What went wrong, if something did."""
        try:
            path = str(self._context.blobs.path(folder))
            reply = await self._context.engine.submit(OpenSampler(sampler, model, path))
            if isinstance(reply, Failed):
                return reply.message
            self._open.add(sampler)
            return None
        finally:
            self._opening.pop(sampler, None)

    # Ends

    async def put_away(self, seconds: float) -> None:
        """Before the engine stops: write down what only it has, so that it is there after the next start. Of
        the many that a loop leaves behind the newest are."""
        rows = await self._context.store.read(lambda connection: samplers.ephemeral(connection, SERVER))
        held: dict[str | None, str | None] = {}
        number: Counter[str] = Counter()
        for row in rows:
            if row.sampler in self._open and row.sampler not in held and number[row.session_id] < _MOST_KEPT:
                number[row.session_id] += 1
                held[row.sampler] = row.folder
        deadline = time.monotonic() + seconds
        for sampler, before in held.items():
            assert sampler is not None
            key = f"samplers/{uuid.uuid4().hex}"
            command = PutSampler(sampler, str(self._context.blobs.path(key)))
            try:
                left = max(0.0, deadline - time.monotonic())
                reply = await asyncio.wait_for(self._context.engine.submit(command), left)
            except (EngineLost, TimeoutError):
                log.error("sampling weights without a name could not all be kept")
                return
            if isinstance(reply, Failed):
                log.error("sampling weights without a name are not kept: %s", reply.message)
                continue
            assert isinstance(reply.payload, dict)
            if not reply.payload["written"]:
                continue
            await self._context.store.write(partial(samplers.set_folder, sampler=sampler, folder=key))
            if before is not None:
                self._context.blobs.delete(before)

    async def _release_unnamed(self, session_id: str) -> None:
        """What was never saved under a name goes with its session."""
        for row in await self._context.store.read(
            lambda connection: samplers.ephemeral_of(connection, session_id, SERVER)
        ):
            if row.sampler is not None:
                self._release(row.sampler)
            if row.folder is not None:
                self._context.blobs.delete(row.folder)
        for id_ in [id_ for id_, row in self._rows.items() if row.session_id == session_id]:
            del self._rows[id_]  # whoever asks for it finds it in the database

    def forget_checkpoint(self, checkpoint_id: str) -> None:
        """A checkpoint was deleted; what was opened of it goes too."""
        self._release(sampler_of(checkpoint_id))

    def _release(self, sampler: str) -> None:
        if sampler in self._open:
            self._open.discard(sampler)
            self._context.spawn(quietly(self._context.engine.submit(ReleaseSampler(sampler))))

    def _engine_lost(self, _generation: int) -> None:
        self._open.clear()


async def quietly(reply: Awaitable[object]) -> None:
    """Wait for an answer that nobody needs."""
    with contextlib.suppress(EngineLost):
        await reply


def _check_base(source: Source, model: ModelInfo) -> None:
    if source.fingerprint != model.fingerprint:
        raise Refused(
            f"model_path: these weights were trained on another base model ({source.base_model},"
            f" {source.fingerprint[:12]}) than the one that is served as {model.name}"
            f" ({model.fingerprint[:12]}); serve the model that they were trained on"
        )
