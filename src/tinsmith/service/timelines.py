"""A session's requests as a file for Perfetto, under a signed URL that needs no key."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tinsmith.store.scope import Scope
from tinsmith.wire.timeline import encode_timeline

from .caller import Caller
from .context import Context
from .errors import NotFound
from .sessions import Sessions
from .signing import Signer

URL_LIFE = 3600  # seconds
ROUTE = "traces"
_KEPT = 4  # files of one session: those whose URLs may still be in use
_HOLD = 3.0  # seconds that a request waits for a file that is being made; then it asks again
_NAME = re.compile(r"[0-9a-f]{32}\.pftrace")


@dataclass(frozen=True, slots=True)
class _File:
    key: str
    content: tuple[int, int]  # how many requests are in it, and how many of those had ended
    made_at: float


class Timelines:
    def __init__(self, context: Context, sessions: Sessions, signer: Signer) -> None:
        self._context = context
        self._sessions = sessions
        self._signer = signer
        self._files: dict[str, list[_File]] = {}
        self._making: dict[str, asyncio.Task[_File]] = {}

    async def export(self, caller: Caller, session_id: str) -> str | None:
        """The address of the session's timeline, from the API's root on; None while it is being made. One
        that has nothing new is not made again."""
        row = await self._sessions.get(caller, session_id)
        task = self._making.get(session_id)
        if task is None:
            name = f"session {session_id}" + (f" ({row.display_name})" if row.display_name else "")
            task = self._making[session_id] = self._context.spawn(
                self._file(session_id, name, caller.scope())
            )
            task.add_done_callback(lambda _: self._making.pop(session_id, None))
        await asyncio.wait({task}, timeout=_HOLD)
        return self._address(task.result()) if task.done() else None

    async def _file(self, session_id: str, name: str, scope: Scope) -> _File:
        requests = await self._context.traces.of_session(session_id, scope)
        content = (len(requests), sum(each.ended is not None for each in requests))
        now = time.time()
        files = self._files.get(session_id, [])
        if files and files[-1].content == content and now - files[-1].made_at < URL_LIFE:
            return files[-1]
        data = await asyncio.to_thread(encode_timeline, name, requests, now)
        file = _File(f"{ROUTE}/{uuid.uuid4().hex}.pftrace", content, now)
        await asyncio.to_thread(self._context.blobs.put, file.key, data)
        await self._keep(session_id, [*self._files.get(session_id, []), file][-_KEPT:])
        return file

    async def _keep(self, session_id: str, kept: list[_File]) -> None:
        gone = [each for each in self._files.pop(session_id, []) if each not in kept]
        if kept:
            self._files[session_id] = kept
        for each in gone:
            await asyncio.to_thread(self._context.blobs.delete, each.key)

    async def sweep(self) -> None:
        """Delete files whose URLs are over."""
        oldest = time.time() - 2 * URL_LIFE
        for session_id, files in list(self._files.items()):
            await self._keep(session_id, [each for each in files if each.made_at > oldest])

    def _address(self, file: _File) -> str:
        expires = int(time.time()) + URL_LIFE
        signature = self._signer.sign(f"GET {file.key}", expires)
        return f"{file.key}?expires={expires}&signature={signature}"

    def file(self, name: str, expires: str, signature: str) -> Path:
        """Where the file lies that a signed URL names."""
        self._signer.check(f"GET {ROUTE}/{name}", expires, signature)
        path = self._context.blobs.path(f"{ROUTE}/{name}") if _NAME.fullmatch(name) else None
        if path is None or not path.is_file():
            raise NotFound("this trace is not there any more; export it again")
        return path
