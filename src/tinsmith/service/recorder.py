"""Writing down what became of commands, and waking who waits."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from tinsmith.store import Connection, commands, ledger, sessions
from tinsmith.store.commands import CommandRow, ResultType
from tinsmith.store.ledger import Entry

from .context import Context
from .errors import NotFound
from .futures import Failure, Outcome, PendingRequest, Result
from .session_status import failure_of_request, failure_of_run
from .steps import CREATES

log = logging.getLogger("tinsmith.service.recorder")

INLINE = 64 * 1024  # bodies and results up to this size live in their row


class Recorder:
    """Holds the pending training requests, and the outcomes that are not in the log yet."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._requests: dict[str, PendingRequest] = {}
        self._fetched: set[str] = set()

    def expect(self, request: PendingRequest) -> PendingRequest:
        """Take a request that has just been logged."""
        return self._requests.setdefault(request.request_id, request)

    def find(self, request_id: str) -> PendingRequest | None:
        return self._requests.get(request_id)

    def __len__(self) -> int:
        return len(self._requests)

    async def record(
        self,
        request: PendingRequest,
        outcome: Outcome,
        usage: Mapping[str, int],
        extra: Callable[[Connection], object] | None,
        used: Sequence[Entry] = (),
    ) -> object:
        """Log an outcome, and enter into the ledger what it `used`. One that comes with something that
        must last (that, or `extra`, in the same transaction, whose answer comes back) is told to nobody
        before it is on the disk, nor is a failure, which a replay skips. Any other is told at once, since a
        replay comes to the same."""
        ended = {Result: "done", Failure: "failed"}.get(type(outcome), "lost")
        self._context.traces.ended(request.request_id, ended, dict(usage))
        if extra is None and not used and not isinstance(outcome, Failure):
            request.resolve(outcome)
        try:
            return await self._write(request, outcome, usage, extra, used)
        except Exception as error:
            log.error("the outcome of %s could not be logged: %s", request.request_id, error)
            if extra is not None:
                raise
            request.resolve(outcome)
            return None  # it stays in memory, where it can still be fetched

    async def _write(
        self,
        request: PendingRequest,
        outcome: Outcome,
        usage: Mapping[str, int],
        extra: Callable[[Connection], object] | None,
        used: Sequence[Entry],
    ) -> object:
        result: bytes | None = None
        result_key: str | None = None
        result_type: ResultType | None = None
        error: str | None = None
        category: str | None = None
        if isinstance(outcome, Result):
            binary = isinstance(outcome.payload, bytes)
            result_type = "protobuf" if binary else "json"
            result = outcome.payload if isinstance(outcome.payload, bytes) else _encode(outcome.payload)
            if len(result) > INLINE:
                result_key = f"results/{uuid.uuid4().hex}"
                await asyncio.to_thread(self._context.blobs.put, result_key, result)
                result = None
        elif isinstance(outcome, Failure):
            error, category = outcome.message, outcome.category

        def write(connection: Connection) -> object:
            answer = extra(connection) if extra is not None else None
            kind = commands.finish(
                connection,
                request.request_id,
                now=time.time(),
                result=result,
                result_key=result_key,
                result_type=result_type,
                usage=usage,
                error=error,
                category=category,
            )
            if kind is not None:
                ledger.add(connection, used)
            if error is not None and kind is not None:
                note_failure(connection, request.request_id, kind, category or "server", error)
            return answer

        answer = await self._context.store.write(write)
        self._context.meter.entered(used)
        request.resolve(outcome)
        self._requests.pop(request.request_id, None)
        return answer

    async def read(self, row: CommandRow) -> Outcome:
        """The outcome that is in the log."""
        if row.status == "failed":
            return Failure(row.error or "failed", "user" if row.category == "user" else "server")
        if row.status == "queued":
            return Failure("the server stopped before this request was carried out", "server")
        if row.result_type is None:
            raise NotFound("request_id: this result was fetched long ago and is not kept any more")
        data = row.result
        if data is None:
            assert row.result_key is not None
            data = await asyncio.to_thread(self._context.blobs.get, row.result_key)
        return Result(data if row.result_type == "protobuf" else json.loads(data))

    def was_fetched(self, request_id: str) -> None:
        self._fetched.add(request_id)

    def flush(self) -> None:
        """Write down which results were fetched; the time that they are kept begins with that."""
        if self._fetched:
            fetched, self._fetched = self._fetched, set()
            now = time.time()
            self._context.store.write_soon(lambda connection: commands.fetched(connection, fetched, now))


def note_failure(connection: Connection, request_id: str, kind: str, category: str, message: str) -> None:
    """Tell the session of a training request that failed or was refused."""
    run_id = request_id.rpartition(":")[0]
    if kind in CREATES:
        failure = failure_of_run(run_id, category, message)
    else:
        failure = failure_of_request(request_id, kind, category, message)
    sessions.failed(connection, run_id.partition(":train:")[0], failure)


def _encode(payload: dict[str, object]) -> bytes:
    return json.dumps(payload, separators=(",", ":")).encode()
