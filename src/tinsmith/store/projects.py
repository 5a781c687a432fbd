"""Projects: what an organization's sessions, runs and checkpoints belong to."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from .tables import project_grants, projects

ProjectRole = Literal["admin", "member", "sampler", "viewer"]

DEFAULT = "Default"


@dataclass(frozen=True, slots=True)
class ProjectRow:
    id: str
    org_id: str
    name: str
    created_at: float
    archived_at: float | None
    is_default: bool
    org_role: ProjectRole | None


def add(
    connection: sa.Connection,
    org_id: str,
    name: str,
    now: float,
    *,
    is_default: bool = False,
    org_role: ProjectRole | None = None,
) -> ProjectRow:
    row = ProjectRow(uuid.uuid4().hex, org_id, name, now, None, is_default, org_role)
    connection.execute(
        projects.insert().values({field: getattr(row, field) for field in ProjectRow.__dataclass_fields__})
    )
    return row


def find(connection: sa.Connection, org_id: str, wanted: str | None) -> ProjectRow | None:
    """An organization's project by its id or its name; None means the default one."""
    named = (
        projects.c.is_default if wanted is None else (projects.c.id == wanted) | (projects.c.name == wanted)
    )
    query = projects.select().where(projects.c.org_id == org_id, projects.c.archived_at.is_(None), named)
    row = connection.execute(query.order_by(projects.c.id != (wanted or "")).limit(1)).one_or_none()
    return ProjectRow(**row._mapping) if row is not None else None


def roles_of(
    connection: sa.Connection, org_id: str, user_id: str
) -> list[tuple[ProjectRow, set[ProjectRole]]]:
    """An organization's projects, each with the roles that a member has there: everybody's and its own."""
    query = (
        sa.select(*projects.c, project_grants.c.role)
        .join(
            project_grants,
            (project_grants.c.project_id == projects.c.id) & (project_grants.c.user_id == user_id),
            isouter=True,
        )
        .where(projects.c.org_id == org_id)
    )
    found = []
    for *values, granted in connection.execute(query):
        row = ProjectRow(*values)
        found.append((row, {role for role in (row.org_role, granted) if role is not None}))
    return found


def of_org(connection: sa.Connection, org_id: str) -> list[ProjectRow]:
    query = projects.select().where(projects.c.org_id == org_id).order_by(projects.c.created_at)
    return [ProjectRow(**row._mapping) for row in connection.execute(query)]
