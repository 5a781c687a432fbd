"""Weights from elsewhere: their files come by signed URLs, and become a checkpoint of a run of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tinsmith.engine.commands import EngineLost, Failed, ImportAdapter, LoraSpec
from tinsmith.store import Connection, checkpoints, ledger, runs, sessions, uploads
from tinsmith.store.checkpoints import CheckpointRow
from tinsmith.store.runs import RunRow
from tinsmith.store.scope import SERVER, Scope
from tinsmith.store.sessions import SessionRow
from tinsmith.store.uploads import UploadRow
from tinsmith.wire.fields import Fields
from tinsmith.wire.paths import TinkerPath
from tinsmith.wire.requests import LoraConfig

from .audit import Actor, about_checkpoint, record
from .caller import Caller
from .context import Context
from .errors import NotFound, OverLimit, Refused, Unavailable, Unwritable
from .external import URL_LIFE, Signed
from .limits import Who
from .sessions import Sessions
from .signing import Signer

ROUTE = "external_weights_uploads"
NAME = "upload"  # of the checkpoint
FILES = ("adapter_config.json", "adapter_model.safetensors")
_CONFIG_LIMIT = 1 << 20
_KEPT = 24 * 3600.0  # seconds after which an upload is given up
_ALPHA = 32.0


class Uploads:
    def __init__(self, context: Context, session_list: Sessions, signer: Signer) -> None:
        self._context = context
        self._sessions = session_list
        self._signer = signer
        self._finishing: dict[str, asyncio.Lock] = {}

    async def start(self, caller: Caller, fields: Fields) -> tuple[str, Signed]:
        """A new upload's id, and where its files go."""
        model = self._context.model(fields.text("base_model"))
        config = LoraConfig.read(fields, model.max_rank)
        project = await self._sessions.project(
            caller, fields.optional_text("destination_project_id"), "work", "destination_project_id"
        )
        lora = LoraSpec(
            rank=config.rank,
            seed=config.seed if config.seed is not None else secrets.randbits(31),
            alpha=_ALPHA,
            train_attn=config.train_attn,
            train_mlp=config.train_mlp,
            train_unembed=config.train_unembed,
        )
        id_ = uuid.uuid4().hex
        row = UploadRow(
            id=id_,
            org_id=caller.org_id,
            project_id=project,
            user_id=caller.user_id,
            key_id=caller.key_id,
            base_model=model.name,
            lora=asdict(lora),
            folder=f"uploads/{id_}",
            created_at=time.time(),
        )
        await self._check_storage(row)
        await self._context.write(lambda connection: uploads.add(connection, row))
        expires = int(time.time() + URL_LIFE)
        return id_, Signed({name: self._address(id_, name, expires) for name in FILES}, float(expires))

    def _address(self, upload_id: str, name: str, expires: int) -> str:
        signature = self._signer.sign(_what(upload_id, name), expires)
        return f"{ROUTE}/{upload_id}/{name}?expires={expires}&signature={signature}"

    async def put(
        self, upload_id: str, name: str, expires: str, signature: str, body: AsyncIterator[bytes]
    ) -> None:
        """Take a file, whole or not at all; the last one of a name counts."""
        self._signer.check(_what(upload_id, name), expires, signature)
        row = await self._context.store.read(lambda connection: uploads.get(connection, upload_id, SERVER))
        if row is None or name not in FILES:
            raise NotFound("there is no such upload")
        if row.path is not None:
            raise Refused(f"this upload is finished: it is the checkpoint {row.path}")
        limit = _CONFIG_LIMIT if name.endswith(".json") else self._context.settings.upload_limit
        folder = self._context.blobs.path(row.folder)
        part = folder / f".{uuid.uuid4().hex}.part"
        try:
            await asyncio.to_thread(folder.mkdir, exist_ok=True)
            size = 0
            with await asyncio.to_thread(open, part, "wb") as file:
                async for chunk in body:
                    size += len(chunk)
                    if size > limit:
                        raise Refused(f"{name}: is larger than {limit} bytes, which is this server's limit")
                    await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(os.replace, part, folder / name)
        except OSError as error:
            raise Unwritable(error) from error
        finally:
            await asyncio.to_thread(part.unlink, missing_ok=True)

    async def finish(self, caller: Caller, upload_id: str) -> TinkerPath:
        """Make a checkpoint of an upload, once. Doing it again answers the same."""
        row = await self._find(caller, upload_id)
        lock = self._finishing.setdefault(row.id, asyncio.Lock())
        try:
            async with lock:
                row = await self._find(caller, upload_id)
                if row.path is None:
                    return await self._make(caller, row)
                return TinkerPath.parse(row.path)
        finally:
            if not lock.locked():
                self._finishing.pop(row.id, None)

    async def _find(self, caller: Caller, upload_id: str) -> UploadRow:
        row = await self._context.store.read(
            lambda connection: uploads.get(connection, upload_id, caller.scope())
        )
        if row is None:
            raise NotFound(f"upload_id: there is no upload {upload_id[:80]!r}")
        caller.require(row.project_id, "work")
        return row

    async def _make(self, caller: Caller, row: UploadRow) -> TinkerPath:
        source = self._context.blobs.path(row.folder)
        missing = await asyncio.to_thread(_missing, source)
        if missing:
            raise Refused(
                f"upload_id: {' and '.join(missing)} has not been uploaded; PUT it to its URL first"
            )
        await self._check_storage(row)
        model = self._context.model(row.base_model)
        id_ = uuid.uuid4().hex
        folder = f"checkpoints/{id_}"
        lora = LoraSpec(**row.lora)  # type: ignore[arg-type]
        target = str(self._context.blobs.path(folder))
        try:
            reply = await self._context.engine.submit(ImportAdapter(model.name, lora, str(source), target))
        except EngineLost:
            raise Unavailable("the engine stopped while it read this upload; try again") from None
        if isinstance(reply, Failed):
            raise Refused(f"upload_id: {reply.message}")
        assert isinstance(reply.payload, dict)
        size, alpha = reply.payload["size_bytes"], reply.payload["alpha"]
        now = time.time()
        session = SessionRow(
            id=str(uuid.uuid4()),
            org_id=row.org_id,
            project_id=row.project_id,
            user_id=row.user_id,
            key_id=row.key_id,
            created_at=now,
            finished_at=None,
            finish_reason=None,
            finish_detail=None,
            tags=["upload"],
            user_metadata=None,
            sdk_version="",
            display_name=None,
        )
        run = RunRow(
            id=f"{session.id}:train:0",
            org_id=row.org_id,
            project_id=row.project_id,
            user_id=row.user_id,
            session_id=session.id,
            model_seq_id=0,
            created_at=now,
            last_request_at=now,
            state="live",
            base_model=model.name,
            lora={**row.lora, "alpha": alpha},
            user_metadata=None,
            fingerprint=model.fingerprint,
            dtype=model.dtype,
            versions=dict(self._context.engine.info.versions),
        )
        checkpoint = CheckpointRow(
            id=id_,
            org_id=row.org_id,
            run_id=run.id,
            kind="external",
            name=NAME,
            seq_id=0,
            folder=folder,
            size_bytes=size if isinstance(size, int) else None,
            created_at=now,
            expires_at=None,
            user_metadata=None,
        )

        def write(connection: Connection) -> None:
            sessions.add(connection, session)
            sessions.finish(connection, session.id, "success", None, now)
            runs.add(connection, run)
            checkpoints.add(connection, checkpoint)
            uploads.finish(connection, row.id, str(checkpoint.path))
            about = about_checkpoint(checkpoint.path)
            record(connection, Actor.of(caller), row.org_id, "checkpoint", "upload", about)

        try:
            await asyncio.shield(self._context.spawn(self._context.write(write)))
        except Unwritable:
            await asyncio.to_thread(self._context.blobs.delete, folder)
            raise
        await asyncio.to_thread(self._context.blobs.delete, row.folder)
        return checkpoint.path

    async def _check_storage(self, row: UploadRow) -> None:
        who = Who(row.org_id, row.project_id, "", row.user_id, row.key_id)
        if not self._context.limits.limits_storage(who):
            return
        scope = Scope(row.org_id, row.user_id, None)
        stored = await self._context.store.read(
            lambda connection: ledger.stored(connection, scope, time.time())
        )
        if (reached := self._context.limits.over_storage(who, stored)) is not None:
            raise OverLimit(reached)

    async def sweep(self) -> None:
        """Forget uploads that were begun long ago; of those that were finished, the checkpoint stays."""
        before = time.time() - _KEPT
        for row in await self._context.store.read(lambda connection: uploads.old(connection, before)):
            await self._context.store.write(partial(uploads.delete, upload_id=row.id))
            await asyncio.to_thread(self._context.blobs.delete, row.folder)


def _missing(folder: Path) -> list[str]:
    return [name for name in FILES if not (folder / name).is_file()]


def _what(upload_id: str, name: str) -> str:
    return f"PUT {upload_id}/{name}"
