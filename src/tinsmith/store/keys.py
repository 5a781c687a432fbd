"""Organizations and their API keys. A key itself is never stored, only its SHA-256."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import sqlalchemy as sa

from .tables import api_keys, organizations


@dataclass(frozen=True, slots=True)
class KeyRow:
    id: str
    org_id: str
    org_name: str
    name: str
    prefix: str
    admin: bool
    created_at: float
    last_used_at: float | None
    revoked_at: float | None


_SELECT = sa.select(
    api_keys.c.id,
    api_keys.c.org_id,
    organizations.c.name.label("org_name"),
    api_keys.c.name,
    api_keys.c.prefix,
    api_keys.c.admin,
    api_keys.c.created_at,
    api_keys.c.last_used_at,
    api_keys.c.revoked_at,
).join(organizations, organizations.c.id == api_keys.c.org_id)


def add(
    connection: sa.Connection, *, name: str, org: str, prefix: str, hash_: str, admin: bool, now: float
) -> KeyRow:
    """A new key of the organization named `org`, which is made where there is none yet."""
    org_id = connection.scalar(sa.select(organizations.c.id).where(organizations.c.name == org))
    if org_id is None:
        org_id = uuid.uuid4().hex
        connection.execute(organizations.insert().values(id=org_id, name=org, created_at=now))
    row = KeyRow(uuid.uuid4().hex, org_id, org, name, prefix, admin, now, None, None)
    connection.execute(
        api_keys.insert().values(
            id=row.id,
            org_id=org_id,
            name=name,
            prefix=prefix,
            hash=hash_,
            admin=admin,
            created_at=now,
        )
    )
    return row


def by_hash(connection: sa.Connection, hash_: str) -> KeyRow | None:
    row = connection.execute(
        _SELECT.where(api_keys.c.hash == hash_, api_keys.c.revoked_at.is_(None))
    ).one_or_none()
    return KeyRow(*row) if row is not None else None


def is_known(connection: sa.Connection, hash_: str) -> bool:
    """Whether there is or was such a key; one that was revoked does not come back."""
    return connection.scalar(sa.select(api_keys.c.id).where(api_keys.c.hash == hash_)) is not None


def every(connection: sa.Connection) -> list[KeyRow]:
    return [KeyRow(*row) for row in connection.execute(_SELECT.order_by(api_keys.c.created_at))]


def any_usable(connection: sa.Connection) -> bool:
    found = connection.scalar(sa.select(api_keys.c.id).where(api_keys.c.revoked_at.is_(None)).limit(1))
    return found is not None


def revoke(connection: sa.Connection, key_id: str, now: float) -> None:
    connection.execute(api_keys.update().where(api_keys.c.id == key_id).values(revoked_at=now))


def touch(connection: sa.Connection, used: dict[str, float]) -> None:
    for key_id, when in used.items():
        connection.execute(api_keys.update().where(api_keys.c.id == key_id).values(last_used_at=when))
