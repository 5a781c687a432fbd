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
from typing import TypeVar, cast

from tinsmith.store import Connection, Store, ledger
from tinsmith.store.ledger import HOUR, Entry, hour_of
from tinsmith.store.scope import SERVER, Scope

from .limits import Place, Who
from .prices import TOKEN_KINDS, Kind, PriceTable, add, cost, plain

log = logging.getLogger("tinsmith.service.metering")

_FOREVER = 2**62
_HOURS_AT_ONCE = 48  # of storage, in one transaction

ZERO = Decimal(0)
K = TypeVar("K")


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
        self._owed_by: dict[str, Decimal] = {}  # the same by session
        self._moved: dict[str, str] = {}  # session to project, where what it began before counts
        self.totals: dict[str, int] = dict.fromkeys(TOKEN_KINDS, 0)  # since the start

    async def start(self) -> None:
        """To be called before anything is entered."""
        await self.accrue()
        month = month_of(time.time())
        self._spent = await self._store.read(lambda connection: spent_by_place(connection, SERVER, month))
        self._month = month

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
            if entry.kind in self.totals:
                self.totals[entry.kind] += entry.quantity
            if entry.hour >= self._month:
                self._add_to(self._spent, entry, entry_cost(entry) or ZERO)

    def owe(self, entries: Iterable[Entry], sign: int = 1) -> None:
        """These were computed, and will be entered (or, with -1, are entered now or never)."""
        for entry in entries:
            amount = (entry_cost(entry) or ZERO) * sign
            self._add_to(self._owed, entry, amount)
            _grow(self._owed_by, entry.session_id, amount)

    def _add_to(self, sums: dict[Place, Decimal], entry: Entry, amount: Decimal) -> None:
        project_id = self._moved.get(entry.session_id, entry.project_id)
        for place in ((entry.org_id, ""), (entry.org_id, project_id)):
            _grow(sums, place, amount)

    def moved(self, session_id: str, org_id: str, old: str, new: str, spent: Decimal) -> None:
        """A session has gone from a project to another one, with the dollars that it has `spent` this month.

        To be called in the step in which the move's transaction comes back: then all that was committed
        before it has been `entered`, and nothing that was committed later.
        """
        self._turn_page()
        self._moved[session_id] = new
        owed = self._owed_by.get(session_id, ZERO)
        for sums, amount in ((self._spent, spent), (self._owed, owed)):
            _grow(sums, (org_id, old), -amount)
            _grow(sums, (org_id, new), amount)

    def _turn_page(self) -> None:
        month = month_of(time.time())
        if month != self._month:
            self._month = month
            self._spent = {}

    # Storage

    async def accrue(self) -> None:
        """Enter the storage of all hours that are over."""
        hour, more = hour_of(time.time()), True
        while more:
            entries, more = await self._store.write(self._accrue)
            self.entered(entries)
        self._accrued = hour

    def _accrue(self, connection: Connection) -> tuple[list[Entry], bool]:
        """What was entered, and whether there is more."""
        now = hour_of(time.time())
        since = ledger.accrued_until(connection)
        if since is None:
            ledger.accrue(connection, [], now)
            return [], False
        until = min(now, since + _HOURS_AT_ONCE * HOUR)
        if until <= since:
            return [], False
        entries = self.storage.entries(list(ledger.spans(connection, SERVER, since)), since, until)
        ledger.accrue(connection, entries, until)
        return entries, until < now


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


def spent_by_place(
    connection: Connection, scope: Scope, since: int, session_id: str | None = None
) -> dict[Place, Decimal]:
    """Dollars by organization and project, of the hours from `since` on; of one session, if it is named."""
    spent: dict[Place, Decimal] = {}
    for each in ledger.sums(connection, scope, since, _FOREVER, session_id):
        rate = Decimal(each.rate) if each.rate else None
        amount = cost(cast(Kind, each.kind), each.quantity, rate) or ZERO
        for place in ((each.org_id, ""), (each.org_id, each.project_id)):
            _grow(spent, place, amount)
    return spent


def _grow(sums: dict[K, Decimal], key: K, amount: Decimal) -> None:
    left = add(sums.get(key, ZERO), amount)
    if left:
        sums[key] = left
    else:
        sums.pop(key, None)


def month_of(seconds: float) -> int:
    """When the calendar month (UTC) of a time began."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return int(datetime(moment.year, moment.month, 1, tzinfo=UTC).timestamp())
