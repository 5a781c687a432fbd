"""The audit log: who did what, when, with which key, and what came of it. Rows are only ever added."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from .tables import audit_log

EventType = Literal["organizations", "teams", "projects", "checkpoints"]
Outcome = Literal["success", "denied", "failed"]


@dataclass(frozen=True, slots=True)
class AuditRow:
    org_id: str
    at: float
    event_type: EventType
    event: str
    outcome: Outcome
    user_id: str | None
    key_id: str | None
    details: dict[str, Any]


_COLUMNS = [audit_log.c[name] for name in AuditRow.__dataclass_fields__]


def add(connection: sa.Connection, row: AuditRow) -> None:
    values = {name: getattr(row, name) for name in AuditRow.__dataclass_fields__}
    connection.execute(audit_log.insert().values({**values, "details": json.dumps(row.details)}))


def page(
    connection: sa.Connection,
    org_id: str,
    since: float,
    until: float,
    event_type: EventType | None = None,
    limit: int | None = None,
    offset: int = 0,
) -> tuple[list[AuditRow], int]:
    """An organization's entries with since <= at < until, in the order in which they were written, and
    how many there are."""
    mine = (audit_log.c.org_id == org_id) & (audit_log.c.at >= since) & (audit_log.c.at < until)
    if event_type is not None:
        mine &= audit_log.c.event_type == event_type
    total = connection.scalar(sa.select(sa.func.count()).select_from(audit_log).where(mine)) or 0
    query = sa.select(*_COLUMNS).where(mine).order_by(audit_log.c.at, audit_log.c.id)
    rows = connection.execute(query.limit(limit).offset(offset))
    return [AuditRow(**{**row._mapping, "details": json.loads(row.details)}) for row in rows], total
