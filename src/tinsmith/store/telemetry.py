"""What clients told of themselves, an event a row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from .scope import Scope
from .tables import sessions, telemetry


@dataclass(frozen=True, slots=True)
class EventRow:
    """`at` is the client's clock. `session_id` is what the client calls its session."""

    org_id: str
    user_id: str
    key_id: str
    session_id: str
    process: str | None
    sdk_version: str
    platform: str
    received_at: float
    event_id: str
    place: int
    at: float
    type: str
    name: str | None
    severity: str
    details: str

    @property
    def known(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.details, parse_constant=str)
        return found


@dataclass(frozen=True, slots=True)
class SessionCount:
    """How many events a session has, and how many of them are errors."""

    org_id: str
    session_id: str
    sdk_version: str
    platform: str
    events: int
    errors: int
    last_at: float


ERRORS = ("ERROR", "CRITICAL")
_COLUMNS = [telemetry.c[name] for name in EventRow.__dataclass_fields__]


def add(connection: sa.Connection, rows: Sequence[EventRow]) -> int:
    """Keep the events of one batch, except those that are there: a batch may be sent again. Answers how many
    were new."""
    new = {row.event_id: row for row in rows}
    if not new:
        return 0
    batch = rows[0]
    query = sa.select(telemetry.c.event_id).where(
        telemetry.c.org_id == batch.org_id,
        telemetry.c.session_id == batch.session_id,
        telemetry.c.event_id.in_(list(new)),
    )
    for event_id in connection.scalars(query).all():
        del new[event_id]
    if new:
        names = EventRow.__dataclass_fields__
        connection.execute(
            telemetry.insert(), [{name: getattr(row, name) for name in names} for row in new.values()]
        )
    return len(new)


def count(connection: sa.Connection, org_id: str) -> int:
    query = sa.select(sa.func.count()).select_from(telemetry).where(telemetry.c.org_id == org_id)
    return connection.scalar(query) or 0


def keep_newest(connection: sa.Connection, org_id: str, most: int) -> None:
    """Forget an organization's oldest events beyond `most`."""
    mine = telemetry.c.org_id == org_id
    query = sa.select(telemetry.c.pk).where(mine).order_by(telemetry.c.pk.desc()).offset(most).limit(1)
    last = connection.scalar(query)
    if last is not None:
        connection.execute(telemetry.delete().where(mine, telemetry.c.pk <= last))


def drop_old(connection: sa.Connection, received_before: float) -> None:
    connection.execute(telemetry.delete().where(telemetry.c.received_at < received_before))


def newest(
    connection: sa.Connection,
    scope: Scope,
    *,
    session_id: str | None = None,
    severities: Sequence[str] | None = None,
    since: float = 0.0,
    limit: int = 100,
) -> list[EventRow]:
    """The last `limit` events, in the order in which they came."""
    query = sa.select(*_COLUMNS).where(scope.rows(telemetry), _from_its_own(since))
    if session_id is not None:
        query = query.where(telemetry.c.session_id == session_id)
    if severities is not None:
        query = query.where(telemetry.c.severity.in_(severities))
    rows = connection.execute(query.order_by(telemetry.c.pk.desc()).limit(limit)).all()
    return [EventRow(**row._mapping) for row in reversed(rows)]


def by_session(
    connection: sa.Connection, scope: Scope, *, since: float = 0.0, limit: int = 100
) -> list[SessionCount]:
    """The `limit` sessions that told something last, in the order of their last event."""
    errors = sa.func.sum(sa.case((telemetry.c.severity.in_(ERRORS), 1), else_=0))
    last = sa.func.max(telemetry.c.received_at)
    of = (telemetry.c.org_id, telemetry.c.session_id)
    query = (
        sa.select(
            *of,
            sa.func.max(telemetry.c.sdk_version),
            sa.func.max(telemetry.c.platform),
            sa.func.count(),
            errors,
            last,
        )
        .where(scope.rows(telemetry), _from_its_own(since))
        .group_by(*of)
        .order_by(last.desc())
        .limit(limit)
    )
    return [SessionCount(*row) for row in reversed(connection.execute(query).all())]


def _from_its_own(since: float) -> sa.ColumnElement[bool]:
    """What somebody says of another organization's session is no news of that session."""
    foreign = sa.exists().where(
        sessions.c.id == telemetry.c.session_id, sessions.c.org_id != telemetry.c.org_id
    )
    return ~foreign & (telemetry.c.received_at >= since)
