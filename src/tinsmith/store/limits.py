"""Limits of organizations and projects, as the operator has set them."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import sqlalchemy as sa

from .scope import Scope
from .tables import limits


@dataclass(frozen=True, slots=True)
class LimitRow:
    """`org_id` empty: of every organization without a value of its own; `project_id` empty: of the
    organization as a whole."""

    org_id: str
    project_id: str
    name: str
    value: Decimal
    set_at: float


def every(connection: sa.Connection, scope: Scope) -> list[LimitRow]:
    query = limits.select().where(scope.rows(limits))
    return [
        LimitRow(row.org_id, row.project_id, row.name, Decimal(row.value), row.set_at)
        for row in connection.execute(query.order_by(limits.c.org_id, limits.c.project_id, limits.c.name))
    ]


def put(connection: sa.Connection, row: LimitRow) -> None:
    """Set a limit, or change it."""
    drop(connection, row.org_id, row.project_id, row.name)
    connection.execute(
        limits.insert().values(
            org_id=row.org_id,
            project_id=row.project_id,
            name=row.name,
            value=str(row.value),
            set_at=row.set_at,
        )
    )


def drop(connection: sa.Connection, org_id: str, project_id: str, name: str) -> bool:
    """Whether there was such a limit."""
    same = (limits.c.org_id == org_id) & (limits.c.project_id == project_id) & (limits.c.name == name)
    return connection.execute(limits.delete().where(same)).rowcount > 0
