"""External weights: their files under signed URLs that need no key."""

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

    def _names(self, folder: str) -> list[str]:
        path = self._context.blobs.path(folder)
        return sorted(file.name for file in path.iterdir()) if path.is_dir() else []

    def _address(self, checkpoint_id: str, name: str, expires: int) -> str:
        signature = self._signer.sign(_what(checkpoint_id, name), expires)
        return f"{ROUTE}/{checkpoint_id}/{quote(name)}?expires={expires}&signature={signature}"


def _what(checkpoint_id: str, name: str) -> str:
    return f"GET {checkpoint_id}/{name}"
