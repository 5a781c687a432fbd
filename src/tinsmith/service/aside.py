"""Where a session's recorded sequences and custom losses lie, and when they go.

The engine writes and reads them itself; sequences expire, and what is left goes with the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from tinsmith.engine.commands import RECORD_TTL

from .context import Context
from .sessions import Sessions

_WAITING = 3600.0  # seconds more for requests that have arrived in time and wait for their turn


class Asides:
    def __init__(self, context: Context, sessions: Sessions) -> None:
        self._context = context
        self._sessions = sessions
        sessions.on_finish.append(self._session_finished)

    async def _session_finished(self, session_id: str) -> None:
        await asyncio.to_thread(self._context.blobs.delete, aside_key(session_id))

    async def sweep(self) -> None:
        """Delete sequences whose day is over, and all that a finished session has left."""
        for key in await asyncio.to_thread(lambda: list(self._context.blobs.keys("aside"))):
            if await self._sessions.end_of(key.partition("/")[2]) is not None:
                await asyncio.to_thread(self._context.blobs.delete, key)
            else:
                await asyncio.to_thread(_expire, self._context.blobs.path(key), time.time())


def aside_key(session_id: str) -> str:
    return f"aside/{session_id}"


def _expire(folder: Path, now: float) -> None:
    for file in folder.glob("sample-*"):
        with contextlib.suppress(OSError):
            if now - file.stat().st_mtime > RECORD_TTL + _WAITING:
                file.unlink()
