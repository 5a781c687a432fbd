"""API keys. A key itself is never stored, only its SHA-256."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from . import people
from .people import Role
from .tables import api_keys, memberships, organizations, users


@dataclass(frozen=True, slots=True)
class KeyRow:
    id: str
    number: int
    org_id: str
    org_name: str
    user_id: str
    user_name: str
    user_email: str | None
    role: Role
    name: str
    prefix: str
    scopes: frozenset[str] | None
    project_id: str | None
    admin: bool
    created_at: float
    last_used_at: float | None
    expires_at: float | None
    revoked_at: float | None


_SELECT = (
    sa.select(
        api_keys.c.id,
        api_keys.c.number,
        api_keys.c.org_id,
        organizations.c.name.label("org_name"),
        api_keys.c.user_id,
        users.c.name.label("user_name"),
        users.c.email.label("user_email"),
        memberships.c.role,
        api_keys.c.name,
        api_keys.c.prefix,
        api_keys.c.scopes,
        api_keys.c.project_id,
        api_keys.c.admin,
        api_keys.c.created_at,
        api_keys.c.last_used_at,
        api_keys.c.expires_at,
        api_keys.c.revoked_at,
    )
    .join(organizations, organizations.c.id == api_keys.c.org_id)
    .join(users, users.c.id == api_keys.c.user_id)
    .join(
        memberships,
        (memberships.c.org_id == api_keys.c.org_id) & (memberships.c.user_id == api_keys.c.user_id),
    )
)


def add(
    connection: sa.Connection,
    *,
    name: str,
    org: str,
    prefix: str,
    hash_: str,
    admin: bool,
    now: float,
    scopes: frozenset[str] | None = None,
    project_id: str | None = None,
    expires_at: float | None = None,
) -> KeyRow:
    """A new key of the user called `name` in the organization called `org`; both are made where there
    are none yet. An organization's first user looks after it."""
    org_id = people.org_named(connection, org) or people.add_org(connection, org, now)
    members = people.members(connection, org_id)
    user = next((member for member in members if member.name == name), None)
    if user is None:
        role: Role = "admin" if admin or not members else "member"
        user = people.add_user(connection, org_id, name, None, role, now)
    number = (connection.scalar(sa.select(sa.func.max(api_keys.c.number))) or 0) + 1
    id_ = uuid.uuid4().hex
    connection.execute(
        api_keys.insert().values(
            id=id_,
            number=number,
            org_id=org_id,
            user_id=user.id,
            name=name,
            prefix=prefix,
            hash=hash_,
            scopes=json.dumps(sorted(scopes)) if scopes is not None else None,
            project_id=project_id,
            admin=admin,
            created_at=now,
            expires_at=expires_at,
        )
    )
    return _read(connection.execute(_SELECT.where(api_keys.c.id == id_)).mappings().one())


def by_hash(connection: sa.Connection, hash_: str) -> KeyRow | None:
    row = (
        connection.execute(
            _SELECT.where(
                api_keys.c.hash == hash_,
                api_keys.c.revoked_at.is_(None),
                organizations.c.disabled_at.is_(None),
                users.c.disabled_at.is_(None),
            )
        )
        .mappings()
        .one_or_none()
    )
    return _read(row) if row is not None else None


def is_known(connection: sa.Connection, hash_: str) -> bool:
    """Whether there is or was such a key; one that was revoked does not come back."""
    return connection.scalar(sa.select(api_keys.c.id).where(api_keys.c.hash == hash_)) is not None


def every(connection: sa.Connection) -> list[KeyRow]:
    return [_read(row) for row in connection.execute(_SELECT.order_by(api_keys.c.created_at)).mappings()]


def any_usable(connection: sa.Connection) -> bool:
    found = connection.scalar(sa.select(api_keys.c.id).where(api_keys.c.revoked_at.is_(None)).limit(1))
    return found is not None


def revoke(connection: sa.Connection, key_id: str, now: float) -> None:
    connection.execute(api_keys.update().where(api_keys.c.id == key_id).values(revoked_at=now))


def touch(connection: sa.Connection, used: dict[str, float]) -> None:
    for key_id, when in used.items():
        connection.execute(api_keys.update().where(api_keys.c.id == key_id).values(last_used_at=when))


def _read(row: sa.RowMapping) -> KeyRow:
    values: dict[str, Any] = {**row}
    values["scopes"] = frozenset(json.loads(values["scopes"])) if values["scopes"] is not None else None
    return KeyRow(**values)
