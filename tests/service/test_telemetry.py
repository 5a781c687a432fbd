"""How many events are kept, and for how long."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.store.rows import make_key
from tinsmith.service.limits import Who
from tinsmith.service.telemetry import Telemetry
from tinsmith.store import Store, telemetry
from tinsmith.store.scope import SERVER, Scope
from tinsmith.wire.telemetry import Event, TelemetryBatch


def batch(*places: int) -> TelemetryBatch:
    events = tuple(Event(f"e{place}", place, 1.0, "GENERIC_EVENT", None, "INFO", "{}") for place in places)
    return TelemetryBatch("s", None, "x", "Linux", events)


def test_they_are_bounded_by_number_for_each_organization_and_by_age(tmp_path: Path) -> None:
    store = Store.open(Store.local_url(tmp_path))
    ours, theirs = (store.write_now(lambda c, org=org: make_key(c, org)) for org in ("ours", "theirs"))
    who, other = (Who(key.org_id, "", "", key.user_id, key.id) for key in (ours, theirs))

    def places(scope: Scope) -> list[int]:
        return [row.place for row in store.write_now(lambda c: telemetry.newest(c, scope))]

    some = Telemetry(store, 60.0, 20)
    some.take(other, batch(99))
    some.take(who, batch(*range(15)))
    some.take(who, batch(*range(10, 22)))
    assert places(Scope(ours.org_id, "", None)) == list(range(22))
    some.take(who, batch(22))
    assert places(Scope(ours.org_id, "", None)) == list(range(3, 23))
    Telemetry(store, 60.0, 5).take(who, batch(23))  # another life of the server, with another bound
    assert places(Scope(ours.org_id, "", None)) == list(range(19, 24))
    Telemetry(store, 60.0, 0).take(who, batch(24))
    assert places(SERVER) == [99, *range(19, 24)]

    asyncio.run(some.sweep())
    assert len(places(SERVER)) == 6
    old = time.time() - 61.0
    store.write_now(lambda c: c.execute(telemetry.telemetry.update().values(received_at=old)))
    asyncio.run(some.sweep())
    assert places(SERVER) == []
    store.close()
