"""Organizations."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import sqlalchemy as sa

from . import projects
from .tables import api_keys, checkpoints, organizations, sessions


@dataclass(frozen=True, slots=True)
class OrgRow:
    id: str
    name: str
    created_at: float
    disabled_at: float | None


_SELECT = sa.select(*(organizations.c[name] for name in OrgRow.__dataclass_fields__)).where(
    organizations.c.deleted_at.is_(None)
)


def add(connection: sa.Connection, name: str, now: float) -> OrgRow:
    """A new organization with its default project, in which every member may work."""
    row = OrgRow(uuid.uuid4().hex, name, now, None)
    connection.execute(organizations.insert().values(id=row.id, name=name, created_at=now))
    projects.add(connection, row.id, projects.DEFAULT, now, is_default=True, org_role="member")
    return row


def find(connection: sa.Connection, wanted: str) -> OrgRow | None:
    """An organization by its id or its name."""
    query = _SELECT.where((organizations.c.id == wanted) | (organizations.c.name == wanted))
    row = connection.execute(query.order_by(organizations.c.id != wanted).limit(1)).one_or_none()
    return OrgRow(*row) if row is not None else None


def every(connection: sa.Connection) -> list[OrgRow]:
    query = _SELECT.order_by(organizations.c.created_at, organizations.c.id)
    return [OrgRow(*row) for row in connection.execute(query)]


def rename(connection: sa.Connection, org: OrgRow, name: str) -> None:
    connection.execute(organizations.update().where(organizations.c.id == org.id).values(name=name))


def set_disabled(connection: sa.Connection, org: OrgRow, since: float | None) -> None:
    connection.execute(organizations.update().where(organizations.c.id == org.id).values(disabled_at=since))


def delete(connection: sa.Connection, org: OrgRow, now: float) -> None:
    """End an organization. Its keys are revoked, its sessions finished and its checkpoints expire, so
    that their files are swept; what it has used stays in the books, and its name is free again."""
    mine = api_keys.c.org_id == org.id
    connection.execute(api_keys.update().where(mine, api_keys.c.revoked_at.is_(None)).values(revoked_at=now))
    mine = sessions.c.org_id == org.id
    connection.execute(
        sessions.update()
        .where(mine, sessions.c.finished_at.is_(None))
        .values(finished_at=now, finish_reason="interrupted", finish_detail="the organization was deleted")
    )
    connection.execute(
        checkpoints.update().where(checkpoints.c.org_id == org.id).values(expires_at=now, published_at=None)
    )
    connection.execute(
        organizations.update()
        .where(organizations.c.id == org.id)
        .values(name=f"{org.name[:200]} ({org.id})", disabled_at=now, deleted_at=now)
    )
