"""A folder as a blob store.

A blob is either there whole or not at all: it is written beside its place, synced, and renamed into
it. Keys are made by the service (kind/hex), never by a client, and cannot leave the folder anyway.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

_KEY = re.compile(r"[a-z]+/[A-Za-z0-9_\-]+(\.[a-z0-9]+)?")
_UNFINISHED = ".part-"


class LocalBlobs:
    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """Where `key` lives. The engine writes and reads folders there itself."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no blob key")
        path = self._folder / key
        path.parent.mkdir(exist_ok=True)
        return path

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under the new key, durably: once this returns, a power cut does not lose it."""
        path = self.path(key)
        part = path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

    def get(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    def delete(self, key: str) -> None:
        """Forget a blob, or a whole folder that an engine wrote. Unknown keys are no error."""
        path = self.path(key)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def keys(self, kind: str) -> Iterator[str]:
        """All keys of one kind, for finding what nothing refers to any more."""
        folder = self._folder / kind
        if folder.is_dir():
            for entry in os.scandir(folder):
                if _KEY.fullmatch(f"{kind}/{entry.name}"):
                    yield f"{kind}/{entry.name}"

    def sweep_unfinished(self) -> None:
        """Remove what a crash left half written, here or by an engine: names with a dot before them."""
        for part in self._folder.glob("*/.*"):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
