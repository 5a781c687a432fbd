"""What clients tell of themselves, kept for the operator within bounds of age and number.

The bound on their number is each organization's own, so that nobody who talks much drives out what others
said. Nothing of it is worth a disk write of its own: a crash may lose the last moment's.
"""

from __future__ import annotations

import time

from tinsmith.store import Connection, Store, telemetry
from tinsmith.store.telemetry import EventRow
from tinsmith.wire.telemetry import TelemetryBatch

from .limits import Who

_SLACK = 1.1  # how far beyond its bound an organization comes before its oldest events go


class Telemetry:
    def __init__(self, store: Store, ttl: float, most: int) -> None:
        """Events are kept for `ttl` seconds, and the newest `most` of an organization."""
        self._store = store
        self._ttl = ttl
        self._most = most
        self._kept: dict[str, int] = {}  # by organization; as the writer knows it

    def take(self, who: Who, batch: TelemetryBatch) -> None:
        """Keep a batch. Nobody looks whose session it names, so that the answer tells nothing of it."""
        if not self._most or not batch.events:
            return
        now = time.time()
        rows = [
            EventRow(
                who.org_id,
                who.user_id,
                who.key_id,
                batch.session_id,
                batch.process,
                batch.sdk_version,
                batch.platform,
                now,
                event.id,
                event.place,
                event.at,
                event.type,
                event.name,
                event.severity,
                event.details,
            )
            for event in batch.events
        ]
        self._store.write_soon(lambda connection: self._keep(connection, who.org_id, rows))

    def _keep(self, connection: Connection, org_id: str, rows: list[EventRow]) -> None:
        """In the store's writer, one at a time."""
        new = telemetry.add(connection, rows)
        known = self._kept.get(org_id)
        kept = telemetry.count(connection, org_id) if known is None else known + new
        if kept > _SLACK * self._most:
            telemetry.keep_newest(connection, org_id, self._most)
            kept = self._most
        self._kept[org_id] = kept

    async def sweep(self) -> None:
        """Forget what is older than it may be."""
        before = time.time() - self._ttl
        await self._store.write(lambda connection: telemetry.drop_old(connection, before))
