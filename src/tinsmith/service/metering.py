"""Metering: what is used becomes entries of the ledger, each with the rate of its hour, and counts once.

A training request's tokens are entered in the transaction that writes down its result: a retry finds the
result, and a replay finds it written. A sample's are entered before its outcome is first told, since
nothing else of it lasts: one that was lost with the server costs nothing, and its client asks again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import cast

from tinsmith.store import Connection, Store, ledger
from tinsmith.store.ledger import HOUR, Entry, hour_of
from tinsmith.store.scope import SERVER, Scope

from .limits import Place, Who
from .prices import KINDS, Kind, PriceTable, add, cost, plain

log = logging.getLogger("tinsmith.service.metering")

_FOREVER = 2**62
_HOURS_AT_ONCE = 48  # of storage, in one transaction

ZERO = Decimal(0)


class Meter:
    """Makes the ledger's entries, and knows what everybody has spent this month."""

    def __init__(
        self, store: Store, prices: PriceTable, active_parameters: Callable[[str], int | None]
    ) -> None:
        """`active_parameters` says how many parameters of a served model a token meets."""
        self._store = store
        self.prices = prices
        self.storage = StorageMeter(prices)
        self._active_parameters = active_parameters
        self._month = 0
        self._accrued = 0  # the hour in which storage was last entered
        self._spent: dict[Place, Decimal] = {}
        self._owed: dict[Place, Decimal] = {}  # what is computed and not entered yet
        self.totals: dict[Kind, int] = dict.fromkeys(KINDS, 0)  # since the start

    async def start(self) -> None:
        await self.accrue()

    async def keep_up(self) -> None:
        """To be called every minute or so."""
        if hour_of(time.time()) != self._accrued:
            await self.accrue()

    def entries(self, who: Who, model: str, used: Mapping[str, int], now: float | None = None) -> list[Entry]:
        """One entry for each kind of which there is any."""
        hour = hour_of(time.time() if now is None else now)
        return [
            Entry(
                hour,
                who.org_id,
                who.project_id,
                who.session_id,
                who.user_id,
                who.key_id,
                model,
                kind,
                self._rate(cast(Kind, kind), model, hour),
                quantity,
            )
            for kind, quantity in used.items()
            if quantity
        ]

    def _rate(self, kind: Kind, model: str, hour: int) -> str:
        return _rate_text(self.prices, kind, model, self._active_parameters(model), hour)

    async def enter(self, entries: Sequence[Entry]) -> None:
        """Write entries into the ledger by themselves."""
        if entries:
            await self._store.write(lambda connection: ledger.add(connection, entries))
            self.entered(entries)

    # What has been spent

    def spent(self, place: Place) -> Decimal:
        """Dollars that an organization, or one of its projects, has spent this month."""
        self._turn_page()
        return add(self._spent.get(place, ZERO), self._owed.get(place, ZERO))

    def entered(self, entries: Iterable[Entry]) -> None:
        """These are in the ledger now."""
        self._turn_page()
        for entry in entries:
            self.totals[cast(Kind, entry.kind)] += entry.quantity
            if entry.hour >= self._month:
                _add_to(self._spent, entry)

    def owe(self, entries: Iterable[Entry], sign: int = 1) -> None:
        """These were computed, and will be entered (or, with -1, are entered now or never)."""
        for entry in entries:
            _add_to(self._owed, entry, sign)

    def _turn_page(self) -> None:
        month = month_of(time.time())
        if month != self._month:
            self._month = month
            self._spent = {}

    # Storage

    async def accrue(self) -> None:
        """Enter the storage of all hours that are over, and take the month's sums anew."""
        self._accrued = hour_of(time.time())
        while await self._store.write(self._accrue):
            pass
        month = month_of(time.time())
        spent = await self._store.read(lambda connection: spent_by_place(connection, SERVER, month))
        self._month, self._spent = month, spent

    def _accrue(self, connection: Connection) -> bool:
        """Whether there is more."""
        now = hour_of(time.time())
        since = ledger.accrued_until(connection)
        if since is None:
            ledger.accrue(connection, [], now)
            return False
        until = min(now, since + _HOURS_AT_ONCE * HOUR)
        if until <= since:
            return False
        entries = self.storage.entries(list(ledger.spans(connection, SERVER, since)), since, until)
        ledger.accrue(connection, entries, until)
        return until < now


class StorageMeter:
    """Makes entries of checkpoints' lives."""

    def __init__(self, prices: PriceTable) -> None:
        self._prices = prices

    def entries(self, spans: Sequence[ledger.Span], since: int, until: int) -> list[Entry]:
        """What checkpoints come to in the hours of [since, until), each by its own rate. `until` may
        lie within an hour."""
        found: dict[Entry, int] = {}
        for hour in range(since, until, HOUR):
            rate = _rate_text(self._prices, "storage", None, None, hour)
            for span in spans:
                quantity = span.byte_seconds(hour, min(hour + HOUR, until))
                if quantity:
                    row = Entry(
                        hour,
                        span.org_id,
                        span.project_id,
                        span.session_id,
                        span.user_id,
                        span.key_id,
                        span.model,
                        "storage",
                        rate,
                        0,
                    )
                    found[row] = found.get(row, 0) + quantity
        return [_with(row, quantity) for row, quantity in found.items()]


def _rate_text(
    prices: PriceTable, kind: Kind, model: str | None, active_parameters: int | None, hour: int
) -> str:
    rate = prices.rate(kind, model, active_parameters, hour)
    return plain(rate) if rate is not None else ""


def _with(row: Entry, quantity: int) -> Entry:
    values = {name: getattr(row, name) for name in Entry.__dataclass_fields__}
    return Entry(**{**values, "quantity": quantity})


def entry_cost(entry: Entry) -> Decimal | None:
    """Dollars, or None for what had no price."""
    return cost(cast(Kind, entry.kind), entry.quantity, Decimal(entry.rate) if entry.rate else None)


def spent_by_place(connection: Connection, scope: Scope, since: int) -> dict[Place, Decimal]:
    """Dollars by organization and project, of the hours from `since` on."""
    spent: dict[Place, Decimal] = {}
    for each in ledger.sums(connection, scope, since, _FOREVER):
        rate = Decimal(each.rate) if each.rate else None
        amount = cost(cast(Kind, each.kind), each.quantity, rate) or ZERO
        for place in ((each.org_id, ""), (each.org_id, each.project_id)):
            spent[place] = add(spent.get(place, ZERO), amount)
    return spent


def _add_to(sums: dict[Place, Decimal], entry: Entry, sign: int = 1) -> None:
    amount = entry_cost(entry)
    if amount:
        for place in ((entry.org_id, ""), (entry.org_id, entry.project_id)):
            left = add(sums.get(place, ZERO), amount * sign)
            if left:
                sums[place] = left
            else:
                sums.pop(place, None)


def month_of(seconds: float) -> int:
    """When the calendar month (UTC) of a time began."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return int(datetime(moment.year, moment.month, 1, tzinfo=UTC).timestamp())
