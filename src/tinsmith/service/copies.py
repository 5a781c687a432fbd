"""Copies of checkpoints: another run's, in another project, over the same files."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace

from tinsmith.store import Connection, checkpoints, ledger, runs, sessions
from tinsmith.store.checkpoints import CheckpointRow
from tinsmith.store.runs import RunRow
from tinsmith.store.scope import SERVER, Scope
from tinsmith.store.sessions import SessionRow
from tinsmith.wire.paths import TinkerPath
from tinsmith.wire.requests import CopyWeights

from .audit import Actor, about_checkpoint, read_by, record, record_reads
from .caller import Caller
from .catalog import Catalog
from .context import Context
from .errors import NotFound, OverLimit, Refused, Unauthorized
from .keys import KeyRing
from .limits import Who
from .sessions import Sessions

_KEYS = uuid.UUID(
    "5a0f6c2e-6d1f-4d0b-9a62-3c5f6a1f9e77"
)  # the namespace of sessions made by an idempotency key


class Copies:
    def __init__(self, context: Context, session_list: Sessions, keyring: KeyRing, catalog: Catalog) -> None:
        self._context = context
        self._sessions = session_list
        self._keyring = keyring
        self._catalog = catalog

    async def copy(
        self, caller: Caller, request: CopyWeights, token: str | None, idempotency_key: str | None
    ) -> TinkerPath:
        """A copy of weights that the caller, or the holder of `token`, may read: in a session of its own in
        a project, or at a place in one of the caller's sessions. It belongs to a run that cannot be trained
        on. The same key, or the same place, makes one copy, however often it is asked for."""
        path = TinkerPath.parse(request.source_path, "source_path")
        if path.kind == "external":
            raise Refused("source_path: external weights are not copied; copy the weights that they are of")
        reader = caller
        if token is not None:
            try:
                reader = await self._keyring.authenticate(token)
            except Unauthorized:
                raise Refused("weights_access_token: is no valid API key of this server") from None
        try:
            source, made_of = await self._catalog.checkpoint(reader, path)
        except NotFound as error:
            raise NotFound(error.detail.replace("path:", "source_path:", 1)) from None
        session, is_new = await self._session(caller, request, idempotency_key)
        now = time.time()
        origin = await self._context.store.read(
            lambda connection: runs.get(connection, source.run_id, SERVER)
        )
        run = RunRow(
            id=f"{session.id}:train:{request.model_seq_id or 0}",
            org_id=session.org_id,
            project_id=session.project_id,
            user_id=caller.user_id,
            session_id=session.id,
            model_seq_id=request.model_seq_id or 0,
            created_at=now,
            last_request_at=now,
            state="copy",
            base_model=made_of.base_model,
            lora=made_of.lora,
            user_metadata=None,
            fingerprint=made_of.fingerprint,
            dtype=origin.dtype if origin is not None else "",
            versions=origin.versions if origin is not None else {},
            optimizer=made_of.optimizer,
        )
        ends = now + request.ttl_seconds if request.ttl_seconds is not None else None
        copy = replace(
            source, id=uuid.uuid4().hex, org_id=session.org_id, run_id=run.id, seq_id=0, created_at=now,
            expires_at=ends, published_at=None,
        )  # fmt: skip
        await self._check_storage(caller, session.project_id)

        def write(connection: Connection) -> CheckpointRow | None:
            if is_new and sessions.get(connection, session.id, caller.scope()) is None:
                sessions.add(connection, session)
                sessions.finish(connection, session.id, "success", None, now)
            if not runs.add(connection, run):
                made = checkpoints.of_run(connection, run.id, caller.scope(), now)
                same = [each for each in made if each.folder == source.folder]
                return same[0] if same else None
            # What was deleted meanwhile has no files to share any more.
            if not checkpoints.is_there(connection, source.id):
                raise NotFound(f"source_path: there is no checkpoint {path}")
            checkpoints.add(connection, copy)
            about, how = about_checkpoint(copy.path), {"source": str(path)}
            record(connection, Actor.of(caller), caller.org_id, "checkpoint", "copy", about, how)
            record_reads(connection, read_by(caller, reader)[1:], path, "copy")
            return copy

        made = await self._context.write(write)
        if made is None:
            what = "model_seq_id" if request.session_id is not None else "X-Idempotency-Key"
            raise Refused(f"{what}: was used for something else already ({run.id}); choose another one")
        return made.path

    async def _session(
        self, caller: Caller, request: CopyWeights, idempotency_key: str | None
    ) -> tuple[SessionRow, bool]:
        if request.session_id is not None:
            return await self._sessions.open(caller, request.session_id, "work"), False
        project = await self._sessions.project(
            caller, request.destination_project_id, "work", "destination_project_id"
        )
        key = f"{caller.org_id} {caller.user_id} {idempotency_key}"
        id_ = uuid.uuid5(_KEYS, key) if idempotency_key is not None else uuid.uuid4()
        now = time.time()
        return SessionRow(
            id=str(id_), org_id=caller.org_id, project_id=project, user_id=caller.user_id,
            key_id=caller.key_id, created_at=now, finished_at=None, finish_reason=None, finish_detail=None,
            tags=["copy"], user_metadata=None, sdk_version="", display_name=None,
        ), True  # fmt: skip

    async def _check_storage(self, caller: Caller, project_id: str) -> None:
        who = Who(caller.org_id, project_id, "", caller.user_id, caller.key_id)
        if not self._context.limits.limits_storage(who):
            return
        scope = Scope(caller.org_id, caller.user_id, None)
        stored = await self._context.store.read(
            lambda connection: ledger.stored(connection, scope, time.time())
        )
        if (reached := self._context.limits.over_storage(who, stored)) is not None:
            raise OverLimit(reached)
