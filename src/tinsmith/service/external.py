"""Checkpoints' files under signed URLs that need no key: external weights, and archives of any checkpoint."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tinsmith.store import checkpoints
from tinsmith.store.scope import SERVER
from tinsmith.wire.paths import TinkerPath

from .audit import AuditLog
from .caller import Caller
from .catalog import Catalog
from .context import Context
from .errors import NotFound, Refused
from .signing import Signer

URL_LIFE = 3600  # seconds
ROUTE = "external_weights"
ARCHIVES = "checkpoint_archives"
_COMPLETE = "checkpoint_complete"  # an empty file, by which SDKs know that an archive is whole


@dataclass(frozen=True, slots=True)
class Signed:
    """Addresses by file name, each from the API's root on, and the time until which they are good."""

    addresses: dict[str, str]
    expires: float


class External:
    def __init__(self, context: Context, catalog: Catalog, signer: Signer, audit: AuditLog) -> None:
        self._audit = audit
        self._context = context
        self._catalog = catalog
        self._signer = signer

    async def urls(self, caller: Caller, path: TinkerPath) -> Signed:
        if path.kind != "external":
            raise Refused(
                f"checkpoint_id: {path} are no external weights, and only those can be downloaded; save some"
                " with save_weights_external()"
            )
        row, _ = await self._catalog.checkpoint(caller, path)
        expires = int(min(time.time() + URL_LIFE, row.expires_at or float("inf")))
        self._audit.was_read(caller, path, "download")
        names = await asyncio.to_thread(self._names, row.folder)
        return Signed({name: self._address(row.id, name, expires) for name in names}, float(expires))

    async def file(self, checkpoint_id: str, name: str, expires: str, signature: str) -> Path:
        """Where a file lies that a signed URL names."""
        self._signer.check(_what(checkpoint_id, name), expires, signature)
        row = await self._context.store.read(
            lambda connection: checkpoints.get(connection, checkpoint_id, SERVER, time.time())
        )
        if row is None or name not in await asyncio.to_thread(self._names, row.folder):
            raise NotFound("these external weights are not there any more")
        return self._context.blobs.path(row.folder) / name

    async def archive_url(self, caller: Caller, path: TinkerPath) -> tuple[str, int]:
        """The address of a tar of any checkpoint's adapter, from the API's root on, and its end."""
        row, _ = await self._catalog.checkpoint(caller, path)
        expires = int(min(time.time() + URL_LIFE, row.expires_at or float("inf")))
        self._audit.was_read(caller, path, "download")
        signature = self._signer.sign(_archive(row.id), expires)
        return f"{ARCHIVES}/{row.id}?expires={expires}&signature={signature}", expires

    async def archived(
        self, checkpoint_id: str, expires: str, signature: str
    ) -> list[tuple[str, int, Path | None]]:
        """What belongs into an archive that a signed URL names: (name, size in bytes, where it lies)."""
        self._signer.check(_archive(checkpoint_id), expires, signature)
        row = await self._context.store.read(
            lambda connection: checkpoints.get(connection, checkpoint_id, SERVER, time.time())
        )
        files = [] if row is None else await asyncio.to_thread(self._adapter, row.folder)
        if not files:
            raise NotFound("this checkpoint is not there any more")
        return [*files, (_COMPLETE, 0, None)]

    def _adapter(self, folder: str) -> list[tuple[str, int, Path | None]]:
        """The adapter's files without its optimizer's."""
        path = self._context.blobs.path(folder)
        names = [name for name in self._names(folder) if name.startswith("adapter_")]
        try:
            return [(name, (path / name).stat().st_size, path / name) for name in names]
        except FileNotFoundError:  # deleted in this moment
            return []

    def _names(self, folder: str) -> list[str]:
        path = self._context.blobs.path(folder)
        return sorted(file.name for file in path.iterdir()) if path.is_dir() else []

    def _address(self, checkpoint_id: str, name: str, expires: int) -> str:
        signature = self._signer.sign(_what(checkpoint_id, name), expires)
        return f"{ROUTE}/{checkpoint_id}/{quote(name)}?expires={expires}&signature={signature}"


def _archive(checkpoint_id: str) -> str:
    return f"GET archive {checkpoint_id}"


def _what(checkpoint_id: str, name: str) -> str:
    return f"GET {checkpoint_id}/{name}"
