"""Projects: what an organization's sessions, runs and checkpoints belong to."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from .tables import checkpoints, project_grants, projects, runs, team_grants, team_members

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


_SELECT = sa.select(*(projects.c[name] for name in ProjectRow.__dataclass_fields__)).where(
    projects.c.deleted_at.is_(None)
)


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
    query = _SELECT.where(projects.c.org_id == org_id, named)
    row = connection.execute(query.order_by(projects.c.id != (wanted or "")).limit(1)).one_or_none()
    return ProjectRow(*row) if row is not None else None


def of_org(connection: sa.Connection, org_id: str) -> list[ProjectRow]:
    query = _SELECT.where(projects.c.org_id == org_id).order_by(projects.c.created_at, projects.c.id)
    return [ProjectRow(*row) for row in connection.execute(query)]


def roles_of(
    connection: sa.Connection, org_id: str, user_id: str
) -> list[tuple[ProjectRow, set[ProjectRole]]]:
    """An organization's projects, each with the roles that a member has there: everybody's, its own, and
    those of its teams."""
    own = sa.select(project_grants.c.project_id, project_grants.c.role).where(
        project_grants.c.org_id == org_id, project_grants.c.user_id == user_id
    )
    of_teams = (
        sa.select(team_grants.c.project_id, team_grants.c.role)
        .join(team_members, team_members.c.team_id == team_grants.c.team_id)
        .where(team_grants.c.org_id == org_id, team_members.c.user_id == user_id)
    )
    granted: dict[str, set[ProjectRole]] = {}
    for project_id, role in connection.execute(sa.union(own, of_teams)):
        granted.setdefault(project_id, set()).add(role)
    return [
        (row, granted.get(row.id, set()) | ({row.org_role} if row.org_role is not None else set()))
        for row in of_org(connection, org_id)
    ]


def grants(connection: sa.Connection, project: ProjectRow) -> list[tuple[str, str, ProjectRole]]:
    """Who was given a role in a project: "user" or "team", its id, and the role."""
    found: list[tuple[str, str, ProjectRole]] = []
    for kind, table, column in (
        ("user", project_grants, project_grants.c.user_id),
        ("team", team_grants, team_grants.c.team_id),
    ):
        query = sa.select(column, table.c.role).where(table.c.project_id == project.id)
        found += [(kind, id_, role) for id_, role in connection.execute(query.order_by(table.c.created_at))]
    return found


def set_grant(
    connection: sa.Connection,
    project: ProjectRow,
    principal: Literal["user", "team"],
    id_: str,
    role: ProjectRole | None,
    now: float,
) -> bool:
    """Give a user or a team a role, or with None take it. Whether that changed anything."""
    table, column = (project_grants, "user_id") if principal == "user" else (team_grants, "team_id")
    mine = (table.c.project_id == project.id) & (table.c[column] == id_)
    before = connection.scalar(sa.select(table.c.role).where(mine))
    if before == role:
        return False
    connection.execute(table.delete().where(mine))
    if role is not None:
        values = {"project_id": project.id, column: id_, "org_id": project.org_id, "role": role}
        connection.execute(table.insert().values({**values, "created_at": now}))
    return True


def set_org_role(connection: sa.Connection, project: ProjectRow, role: ProjectRole | None) -> None:
    """What every member of the organization may do in a project."""
    connection.execute(projects.update().where(projects.c.id == project.id).values(org_role=role))


def rename(connection: sa.Connection, project: ProjectRow, name: str) -> None:
    connection.execute(projects.update().where(projects.c.id == project.id).values(name=name))


def set_archived(connection: sa.Connection, project: ProjectRow, since: float | None) -> None:
    connection.execute(projects.update().where(projects.c.id == project.id).values(archived_at=since))


def delete(connection: sa.Connection, project: ProjectRow, now: float) -> None:
    """End a project. Its checkpoints expire, so that their files are swept; what was used in it stays in
    the books, and its name is free again."""
    for table in (project_grants, team_grants):
        connection.execute(table.delete().where(table.c.project_id == project.id))
    mine = sa.select(runs.c.id).where(runs.c.project_id == project.id)
    connection.execute(
        checkpoints.update()
        .where(checkpoints.c.org_id == project.org_id, checkpoints.c.run_id.in_(mine))
        .values(expires_at=now, published_at=None)
    )
    connection.execute(
        projects.update()
        .where(projects.c.id == project.id)
        .values(name=f"{project.name[:200]} ({project.id})", archived_at=now, deleted_at=now)
    )
