"""Organizations, and the users that are members of them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from . import projects
from .tables import memberships, organizations, users

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


_MEMBERS = sa.select(
    users.c.id,
    memberships.c.org_id,
    users.c.name,
    users.c.email,
    memberships.c.role,
    users.c.created_at,
    users.c.disabled_at,
).join(memberships, memberships.c.user_id == users.c.id)


def org_named(connection: sa.Connection, name: str) -> str | None:
    """The id of the organization called `name`."""
    found: str | None = connection.scalar(sa.select(organizations.c.id).where(organizations.c.name == name))
    return found


def add_org(connection: sa.Connection, name: str, now: float) -> str:
    """A new organization with its default project, in which every member may work."""
    org_id = uuid.uuid4().hex
    connection.execute(organizations.insert().values(id=org_id, name=name, created_at=now))
    projects.add(connection, org_id, projects.DEFAULT, now, is_default=True, org_role="member")
    return org_id


def members(connection: sa.Connection, org_id: str) -> list[UserRow]:
    query = _MEMBERS.where(memberships.c.org_id == org_id)
    return [UserRow(*row) for row in connection.execute(query.order_by(users.c.created_at, users.c.id))]


def add_user(
    connection: sa.Connection, org_id: str, name: str, email: str | None, role: Role, now: float
) -> UserRow:
    """A new member of an organization. One whose e-mail address is known is the same user."""
    user_id = connection.scalar(sa.select(users.c.id).where(users.c.email == email)) if email else None
    if user_id is None:
        user_id = uuid.uuid4().hex
        connection.execute(users.insert().values(id=user_id, name=name, email=email, created_at=now))
    connection.execute(memberships.insert().values(org_id=org_id, user_id=user_id, role=role, created_at=now))
    query = _MEMBERS.where(memberships.c.org_id == org_id, users.c.id == user_id)
    return UserRow(*connection.execute(query).one())
