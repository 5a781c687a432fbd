"""What everybody has spent this month, as budgets are held against it: always what the ledger says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from tests.store.rows import make_key
from tinsmith.service import metering
from tinsmith.service.limits import Who
from tinsmith.service.metering import Meter, month_of, spent_by_place
from tinsmith.service.prices import PriceTable
from tinsmith.store import Connection, Store, ledger, projects, runs, sessions
from tinsmith.store.runs import RunRow
from tinsmith.store.scope import SERVER
from tinsmith.store.sessions import SessionRow

PRICES = PriceTable.parse(
    {
        "model": [{"name": "m", "prefill": 1, "sample": Decimal("0.3"), "train": 3}],
        "storage": [{"gb_month": Decimal("0.1")}],
    }
)
EVE, FIRST = datetime(2027, 1, 31, 22, 59, 50, tzinfo=UTC), datetime(2027, 2, 1, tzinfo=UTC)


@dataclass
class Clock:
    now: float

    def time(self) -> float:
        return self.now


@dataclass
class Books:
    """An organization with the projects `old` and `new`, and a session in the first."""

    store: Store
    meter: Meter
    clock: Clock
    who: Who
    new: str

    def agree(self) -> bool:
        """Whether the meter's sums are those of the ledger."""
        month = month_of(self.clock.now)
        told = self.store.write_now(lambda connection: spent_by_place(connection, SERVER, month))
        places = [(self.who.org_id, project) for project in ("", self.who.project_id, self.new)]
        return [self.meter.spent(place) for place in places] == [
            told.get(place, Decimal(0)) for place in places
        ]

    async def use(self, **tokens: int) -> None:
        await self.meter.enter(self.meter.entries(self.who, "m", tokens))

    async def move(self) -> None:
        """As the session's move does it."""
        month = month_of(self.clock.now)

        def work(connection: Connection) -> tuple[str, Decimal]:
            old = sessions.move(connection, "s", self.new)
            spent = spent_by_place(connection, SERVER, month, "s")
            return old, spent.get((self.who.org_id, self.new), Decimal(0))

        old, spent = await self.store.write(work)
        self.meter.moved("s", self.who.org_id, old, self.new, spent)


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    store = Store.open(Store.local_url(tmp_path))
    clock = Clock(EVE.timestamp())
    monkeypatch.setattr(metering, "time", clock)

    def write(connection: Connection) -> tuple[Who, str]:
        key = make_key(connection, "o")
        old = projects.find(connection, key.org_id, None)
        assert old is not None
        new = projects.add(connection, key.org_id, "new", 1.0)
        assert new is not None
        whose = (key.org_id, old.id, key.user_id)
        sessions.add(connection, SessionRow("s", *whose, key.id, 1.0, None, None, None, [], {}, "x", None))
        runs.add(connection, RunRow("r", *whose, "s", 0, 1.0, 1.0, "live", "m", {}, None, "f", "fp32", {}))
        return Who(key.org_id, old.id, "s", key.user_id, key.id), new.id

    who, new = store.write_now(write)
    yield Books(store, Meter(store, PRICES, lambda name: None), clock, who, new)
    store.close()


def test_what_a_session_has_spent_goes_with_it_at_once(books: Books) -> None:
    old, new = (books.who.org_id, books.who.project_id), (books.who.org_id, books.new)

    async def work() -> None:
        await books.meter.start()
        await books.use(train=1000)
        computed = books.meter.entries(books.who, "m", {"sample": 500})
        books.meter.owe(computed)  # and not entered yet
        assert books.meter.spent(old) == Decimal("0.00315")
        # Others write while it moves: each counts once, and where the ledger has it.
        await asyncio.gather(books.use(train=7), books.move(), books.use(train=11), books.use(prefill=5))
        assert books.meter.spent(old) == 0
        assert books.meter.spent(new) == Decimal("0.003054") + Decimal("0.000005") + Decimal("0.00015")
        await books.meter.enter(computed)
        books.meter.owe(computed, -1)
        assert books.agree()
        await books.move()  # to where it is already
        assert books.agree()

    asyncio.run(work())


def test_a_month_ends_with_its_last_hour(books: Books) -> None:
    """What is computed before midnight and entered after it is the old month's, and so is the storage of its
    last hour, which is entered when that is over."""
    org = (books.who.org_id, "")

    async def work() -> None:
        await books.meter.start()
        books.store.write_now(
            lambda connection: ledger.begin_span(connection, "c", "r", 36 * 10**9, EVE.timestamp())
        )
        await books.use(train=1000)
        books.clock.now = FIRST.timestamp() - 1
        late = books.meter.entries(books.who, "m", {"train": 10**6})
        await books.meter.keep_up()  # the storage of ten seconds: 0.1 GB-hours
        in_january = Decimal("0.003") + Decimal("0.000013888889")
        assert books.meter.spent(org) == in_january
        assert books.agree()
        books.clock.now = FIRST.timestamp() + 2
        assert books.meter.spent(org) == 0
        await books.meter.enter(late)
        await books.meter.keep_up()
        assert books.meter.spent(org) == 0
        await books.use(train=10)
        assert books.meter.spent(org) == Decimal("0.00003")
        assert books.agree()
        january = books.store.write_now(
            lambda connection: ledger.rows(connection, SERVER, 0, FIRST.timestamp())
        )
        assert sum(row.quantity for row in january if row.kind == "train") == 1_001_000
        assert [row.quantity for row in january if row.kind == "storage"] == [
            36 * 10**10,
            36 * 10**9 * 3600,
        ]
        # A server that is started anew knows the same.
        again = Meter(books.store, PRICES, lambda name: None)
        await again.start()
        assert again.spent(org) == Decimal("0.00003")

    asyncio.run(work())
