"""What an organization has used and what it stores, as its administrators are shown it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import cast

from tinsmith.store import Connection, ledger, people, projects, sessions
from tinsmith.store.ledger import HOUR, Entry, Span
from tinsmith.store.scope import Scope

from .caller import Caller
from .context import Context
from .errors import NotFound, Refused
from .metering import entry_cost
from .prices import GIGABYTE, MONTH_HOURS, Kind, cost, gigabyte_hours
from .reports import entries

MOST_DAYS = 14
_DAY = 24 * HOUR


@dataclass(frozen=True, slots=True)
class User:
    id: str
    name: str
    email: str | None


@dataclass(frozen=True, slots=True)
class Line:
    """One hour's usage of one kind, model, session and user. Storage belongs to no session."""

    hour: int
    kind: Kind
    model: str | None
    session_id: str | None
    project_id: str
    user_id: str
    user_name: str | None
    quantity: int
    rate: Decimal | None  # per million tokens, or per GB-month
    cost: Decimal | None

    @property
    def gigabyte_hours(self) -> Decimal:
        return gigabyte_hours(self.quantity)


@dataclass(frozen=True, slots=True)
class Usage:
    lines: list[Line]
    sessions: Mapping[str, dict[str, object] | None]  # metadata


@dataclass(frozen=True, slots=True)
class Stored:
    """What a user's sessions hold in a project."""

    project_id: str
    user_id: str
    user: User | None
    checkpoints: int
    size_bytes: int
    monthly_cost: Decimal | None

    @property
    def gigabytes(self) -> Decimal:
        return Decimal(self.size_bytes) / GIGABYTE


class Billing:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def usage(self, caller: Caller, since: float, until: float) -> Usage:
        """The usage of the hours in [since, until): whole hours, two weeks at most."""
        caller.require_org("billing")
        _check_window(since, until)
        scope = Scope(caller.org_id, caller.user_id, None)

        def look(connection: Connection) -> tuple[list[Entry], list[User]]:
            found = entries(connection, scope, self._context.meter.storage, since, until)
            return found, _users(connection, caller.org_id)

        rows, users = await self._context.store.read(look)
        lines = _lines(rows, {user.id: user for user in users})
        named = sorted({line.session_id for line in lines if line.session_id is not None})
        metadata = await self._context.store.read(
            lambda connection: sessions.metadata_of(connection, named, scope)
        )
        return Usage(lines, {session_id: metadata.get(session_id) for session_id in named})

    async def stored(self, caller: Caller, project_id: str | None) -> tuple[Decimal | None, list[Stored]]:
        """The rate of this hour, and what is stored now, by project and owner."""
        caller.require_org("billing")
        scope = Scope(caller.org_id, caller.user_id, None)
        now = time.time()

        def look(connection: Connection) -> tuple[bool, list[Span], list[User]]:
            of_org = {row.id for row in projects.of_org(connection, caller.org_id)}
            known = project_id is None or project_id in of_org
            return known, list(ledger.spans(connection, scope, now)), _users(connection, caller.org_id)

        known, spans, users = await self._context.store.read(look)
        if not known:
            raise NotFound(f"project_id: there is no project {(project_id or '')[:80]!r}")
        rate = self._context.meter.prices.rate("storage", None, None, now)
        by_id = {user.id: user for user in users}
        groups: dict[tuple[str, str], list[Span]] = {}
        for span in spans:
            if project_id in (None, span.project_id):
                groups.setdefault((span.project_id, span.user_id), []).append(span)
        return rate, [
            Stored(
                project,
                user_id,
                by_id.get(user_id),
                len(mine),
                size := sum(span.size_bytes for span in mine),
                cost("storage", size * HOUR * MONTH_HOURS, rate),
            )
            for (project, user_id), mine in sorted(groups.items())
        ]


def _users(connection: Connection, org_id: str) -> list[User]:
    return [User(row.id, row.name, row.email) for row in people.members(connection, org_id)]


def _lines(rows: Sequence[Entry], users: Mapping[str, User]) -> list[Line]:
    """Rows of the ledger, those of different keys added up; by hour, and in it the largest first."""
    added: dict[Entry, int] = {}
    costs: dict[Entry, Decimal | None] = {}
    for row in rows:
        storage = row.kind == "storage"
        group = replace(row, key_id="", quantity=0, session_id="" if storage else row.session_id)
        spent = entry_cost(row)
        added[group] = added.get(group, 0) + row.quantity
        costs[group] = None if spent is None else spent + (costs.get(group) or 0)
    lines = [
        Line(
            hour=group.hour,
            kind=cast(Kind, group.kind),
            model=group.model or None,
            session_id=group.session_id or None,
            project_id=group.project_id,
            user_id=group.user_id,
            user_name=users[group.user_id].name if group.user_id in users else None,
            quantity=quantity,
            rate=Decimal(group.rate) if group.rate else None,
            cost=costs[group],
        )
        for group, quantity in added.items()
    ]
    tokens = ("train", "prefill", "cached_prefill", "sample")
    return sorted(lines, key=lambda line: (line.hour, -(line.quantity if line.kind in tokens else 0)))


def _check_window(since: float, until: float) -> None:
    for name, moment in (("starting_on", since), ("ending_before", until)):
        if moment % HOUR:
            raise Refused(f"{name}: must be a full hour (UTC), such as 2026-07-13T00:00:00Z")
    if since > time.time():
        raise Refused("starting_on: must not be in the future")
    if until <= since:
        raise Refused("ending_before: must be after starting_on")
    if until - since > MOST_DAYS * _DAY:
        raise Refused(f"ending_before: must be at most {MOST_DAYS} days after starting_on")
