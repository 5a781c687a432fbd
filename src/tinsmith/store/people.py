"""Users, and the organizations that they are members of."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from . import teams
from .tables import api_keys, memberships, project_grants, users

Role = Literal["admin", "billing-admin", "member"]


@dataclass(frozen=True, slots=True)
class UserRow:
    """A member of an organization."""

    id: str
    org_id: str
    name: str
    email: str | None
    role: Role
    created_at: float
    disabled_at: float | None

    @property
    def shown(self) -> str:
        """As people know it."""
        return self.email or self.name


_MEMBERS = sa.select(
    users.c.id,
    memberships.c.org_id,
    users.c.name,
    users.c.email,
    memberships.c.role,
    users.c.created_at,
    users.c.disabled_at,
).join(memberships, memberships.c.user_id == users.c.id)


def members(connection: sa.Connection, org_id: str) -> list[UserRow]:
    query = _MEMBERS.where(memberships.c.org_id == org_id)
    return [UserRow(*row) for row in connection.execute(query.order_by(users.c.created_at, users.c.id))]


def find(connection: sa.Connection, org_id: str, wanted: str) -> list[UserRow]:
    """An organization's members with this id, this e-mail address or this name; the first that there are."""
    for column in (users.c.id, users.c.email, users.c.name):
        rows = connection.execute(_MEMBERS.where(memberships.c.org_id == org_id, column == wanted)).all()
        if rows:
            return [UserRow(*row) for row in rows]
    return []


def orgs_of(connection: sa.Connection, user_id: str) -> list[str]:
    """The ids of the organizations that a user is a member of."""
    query = sa.select(memberships.c.org_id).where(memberships.c.user_id == user_id)
    return [str(org_id) for org_id in connection.scalars(query)]


def add(
    connection: sa.Connection, org_id: str, name: str, email: str | None, role: Role, now: float
) -> UserRow | None:
    """A new member of an organization, or None where it is one already. One whose e-mail address is
    known from another organization is the same user."""
    user_id = connection.scalar(sa.select(users.c.id).where(users.c.email == email)) if email else None
    if user_id is None:
        user_id = uuid.uuid4().hex
        connection.execute(users.insert().values(id=user_id, name=name, email=email, created_at=now))
    elif find(connection, org_id, user_id):
        return None
    connection.execute(memberships.insert().values(org_id=org_id, user_id=user_id, role=role, created_at=now))
    return find(connection, org_id, user_id)[0]


def set_role(connection: sa.Connection, user: UserRow, role: Role) -> None:
    mine = (memberships.c.org_id == user.org_id) & (memberships.c.user_id == user.id)
    connection.execute(memberships.update().where(mine).values(role=role))


def set_disabled(connection: sa.Connection, user: UserRow, since: float | None) -> None:
    """In all of its organizations."""
    connection.execute(users.update().where(users.c.id == user.id).values(disabled_at=since))


def remove(connection: sa.Connection, user: UserRow, now: float) -> None:
    """End a membership: its keys are revoked, and its roles are gone. What it has made stays. A user that
    is a member of nothing any more is deleted, and its e-mail address is free again."""
    for table in (api_keys, project_grants, memberships):
        mine = (table.c.org_id == user.org_id) & (table.c.user_id == user.id)
        if table is api_keys:
            connection.execute(
                api_keys.update().where(mine, api_keys.c.revoked_at.is_(None)).values(revoked_at=now)
            )
        else:
            connection.execute(table.delete().where(mine))
    teams.leave_all(connection, user.org_id, user.id)
    if not orgs_of(connection, user.id):
        connection.execute(
            users.update().where(users.c.id == user.id).values(deleted_at=now, disabled_at=now, email=None)
        )
