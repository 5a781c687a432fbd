"""Usage added up by whatever the operator asks for: what was used, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import cast

from tinsmith.store import Connection, ledger
from tinsmith.store.ledger import Entry
from tinsmith.store.scope import Scope

from .metering import StorageMeter, entry_cost
from .prices import KINDS, Kind, add

ATTRIBUTES = ("org", "project", "session", "user", "key", "model")
PERIODS = ("hour", "day", "month")

Names = Mapping[str, Mapping[str, str]]  # of an attribute's ids


@dataclass(slots=True)
class Row:
    """`of` says of what, in the order that was asked for; `quantities` are tokens, saved checkpoints and
    byte-seconds by kind. `unpriced` says whether there is something in it that had no price."""

    of: tuple[str, ...]
    quantities: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    cost: Decimal = Decimal(0)
    unpriced: bool = False

    def count(self, entry: Entry) -> None:
        self.quantities[cast(Kind, entry.kind)] += entry.quantity
        spent = entry_cost(entry)
        if spent is not None:
            self.cost = add(self.cost, spent)
        elif entry.kind != "checkpoint":
            self.unpriced = True


def entries(
    connection: Connection, scope: Scope, storage: StorageMeter, since: float, until: float
) -> list[Entry]:
    """The ledger of the hours that begin in [since, until), with the storage of the hour under way."""
    now = int(time.time())
    accrued = ledger.accrued_until(connection)
    begin = max(ledger.hour_of(since), accrued if accrued is not None else ledger.hour_of(now))
    found = ledger.rows(connection, scope, since, until)
    end = min(int(until), now)
    return found + storage.entries(list(ledger.spans(connection, scope, begin)), begin, end)


def add_up(found: Sequence[Entry], by: Sequence[str], only: Mapping[str, str], names: Names) -> list[Row]:
    """A row for each combination of `by` (ATTRIBUTES and PERIODS) that occurs, in order. `only` keeps what
    has these values: ids, or names as `names` has them."""
    rows: dict[tuple[str, ...], Row] = {}
    for entry in found:
        if all(_is(entry, attribute, wanted, names) for attribute, wanted in only.items()):
            of = tuple(_shown(entry, name, names) for name in by)
            rows.setdefault(of, Row(of)).count(entry)
    return sorted(rows.values(), key=lambda row: row.of)


def total(rows: Sequence[Row], width: int) -> Row:
    whole = Row(("",) * width)
    for row in rows:
        for kind, quantity in row.quantities.items():
            whole.quantities[kind] += quantity
        whole.cost = add(whole.cost, row.cost)
        whole.unpriced |= row.unpriced
    return whole


def _id(entry: Entry, attribute: str) -> str:
    return entry.model if attribute == "model" else str(getattr(entry, f"{attribute}_id"))


def _is(entry: Entry, attribute: str, wanted: str, names: Names) -> bool:
    if attribute == "kind":
        return entry.kind == wanted
    id_ = _id(entry, attribute)
    return wanted in (id_, names.get(attribute, {}).get(id_))


def _shown(entry: Entry, name: str, names: Names) -> str:
    if name in PERIODS:
        text = datetime.fromtimestamp(entry.hour, UTC).strftime("%Y-%m-%dT%H:00Z")
        return text[: {"hour": 17, "day": 10, "month": 7}[name]]
    id_ = _id(entry, name)
    return names.get(name, {}).get(id_, id_)
