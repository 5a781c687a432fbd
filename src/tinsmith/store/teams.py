"""Teams: users that are given roles in projects together."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import sqlalchemy as sa

from .tables import team_grants, team_members, teams


@dataclass(frozen=True, slots=True)
class TeamRow:
    id: str
    org_id: str
    name: str
    created_at: float


def add(connection: sa.Connection, org_id: str, name: str, now: float) -> TeamRow:
    row = TeamRow(uuid.uuid4().hex, org_id, name, now)
    connection.execute(teams.insert().values(id=row.id, org_id=org_id, name=name, created_at=now))
    return row


def find(connection: sa.Connection, org_id: str, wanted: str) -> TeamRow | None:
    """An organization's team by its id or its name."""
    query = teams.select().where(teams.c.org_id == org_id, (teams.c.id == wanted) | (teams.c.name == wanted))
    row = connection.execute(query.order_by(teams.c.id != wanted).limit(1)).one_or_none()
    return TeamRow(**row._mapping) if row is not None else None


def of_org(connection: sa.Connection, org_id: str) -> list[TeamRow]:
    query = teams.select().where(teams.c.org_id == org_id).order_by(teams.c.created_at, teams.c.id)
    return [TeamRow(**row._mapping) for row in connection.execute(query)]


def members(connection: sa.Connection, team: TeamRow) -> list[str]:
    """The ids of a team's users."""
    query = sa.select(team_members.c.user_id).where(team_members.c.team_id == team.id)
    return [str(user_id) for user_id in connection.scalars(query.order_by(team_members.c.user_id))]


def join(connection: sa.Connection, team: TeamRow, user_id: str) -> bool:
    """Whether the user was not in it yet."""
    if user_id in members(connection, team):
        return False
    connection.execute(team_members.insert().values(team_id=team.id, user_id=user_id, org_id=team.org_id))
    return True


def leave(connection: sa.Connection, team: TeamRow, user_id: str) -> bool:
    """Whether the user was in it."""
    mine = (team_members.c.team_id == team.id) & (team_members.c.user_id == user_id)
    return connection.execute(team_members.delete().where(mine)).rowcount > 0


def leave_all(connection: sa.Connection, org_id: str, user_id: str) -> None:
    mine = (team_members.c.org_id == org_id) & (team_members.c.user_id == user_id)
    connection.execute(team_members.delete().where(mine))


def delete(connection: sa.Connection, team: TeamRow) -> None:
    for table in (team_grants, team_members):
        connection.execute(table.delete().where(table.c.team_id == team.id))
    connection.execute(teams.delete().where(teams.c.id == team.id))
