"""API keys. A key itself is never stored, only its SHA-256."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

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
    role: Role | None  # None: its user is no member any more
    name: str
    prefix: str
    scopes: frozenset[str] | None
    project_id: str | None
    admin: bool
    created_at: float
    last_used_at: float | None
    expires_at: float | None
    revoked_at: float | None
    note: str | None


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
        api_keys.c.note,
    )
    .join(organizations, organizations.c.id == api_keys.c.org_id)
    .join(users, users.c.id == api_keys.c.user_id)
    .join(
        memberships,
        (memberships.c.org_id == api_keys.c.org_id) & (memberships.c.user_id == api_keys.c.user_id),
        isouter=True,
    )
)


def add(
    connection: sa.Connection,
    *,
    org_id: str,
    user_id: str,
    name: str,
    prefix: str,
    hash_: str,
    now: float,
    admin: bool = False,
    scopes: frozenset[str] | None = None,
    project_id: str | None = None,
    expires_at: float | None = None,
    note: str | None = None,
) -> KeyRow:
    """A new key of a member of an organization."""
    number = (connection.scalar(sa.select(sa.func.max(api_keys.c.number))) or 0) + 1
    id_ = uuid.uuid4().hex
    connection.execute(
        api_keys.insert().values(
            id=id_,
            number=number,
            org_id=org_id,
            user_id=user_id,
            name=name,
            prefix=prefix,
            hash=hash_,
            scopes=json.dumps(sorted(scopes)) if scopes is not None else None,
            project_id=project_id,
            admin=admin,
            created_at=now,
            expires_at=expires_at,
            note=note,
        )
    )
    return _read(connection.execute(_SELECT.where(api_keys.c.id == id_)).mappings().one())


_USABLE = (
    api_keys.c.revoked_at.is_(None)
    & organizations.c.disabled_at.is_(None)
    & users.c.disabled_at.is_(None)
    & memberships.c.role.is_not(None)
)


def usable(connection: sa.Connection, *, hash_: str | None = None, id_: str | None = None) -> KeyRow | None:
    """A key that may be used, unless it has expired, by its hash or its id."""
    named = api_keys.c.hash == hash_ if hash_ is not None else api_keys.c.id == id_
    row = connection.execute(_SELECT.where(named, _USABLE)).mappings().one_or_none()
    return _read(row) if row is not None else None


def id_of(connection: sa.Connection, hash_: str) -> str | None:
    """A key's id, also of one that was revoked: that one does not come back."""
    found: str | None = connection.scalar(sa.select(api_keys.c.id).where(api_keys.c.hash == hash_))
    return found


def every(connection: sa.Connection) -> list[KeyRow]:
    return [_read(row) for row in connection.execute(_SELECT.order_by(api_keys.c.created_at)).mappings()]


def any_usable(connection: sa.Connection, now: float) -> bool:
    alive = api_keys.c.expires_at.is_(None) | (api_keys.c.expires_at > now)
    return connection.execute(_SELECT.where(_USABLE, alive).limit(1)).first() is not None


def revoke(connection: sa.Connection, key_id: str, now: float) -> None:
    connection.execute(api_keys.update().where(api_keys.c.id == key_id).values(revoked_at=now))


def set_expiry(connection: sa.Connection, key_id: str, expires_at: float) -> None:
    connection.execute(api_keys.update().where(api_keys.c.id == key_id).values(expires_at=expires_at))


def touch(connection: sa.Connection, used: dict[str, float]) -> None:
    for key_id, when in used.items():
        connection.execute(api_keys.update().where(api_keys.c.id == key_id).values(last_used_at=when))


def _read(row: sa.RowMapping) -> KeyRow:
    values: dict[str, Any] = {**row}
    values["scopes"] = frozenset(json.loads(values["scopes"])) if values["scopes"] is not None else None
    return KeyRow(**values)
