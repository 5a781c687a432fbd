"""API keys: who is calling."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass

from tinsmith.store import Store, keys
from tinsmith.store.keys import KeyRow
from tinsmith.store.people import Role

from .errors import Unauthorized

PREFIX = "tml-"
_REMEMBERED = 5.0  # seconds for which a key that was looked up is taken for valid


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is."""

    key_id: str
    org_id: str
    org_name: str
    user_id: str
    user_name: str
    user_email: str | None
    role: Role
    scopes: frozenset[str] | None  # None: whatever the role allows
    project_id: str | None  # the one project that the key is good for; None: all of the user's
    admin: bool  # an operator of this server


def make_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(store: Store, name: str, *, org: str, admin: bool = False, key: str | None = None) -> str:
    """Make a key, or take `key`; the answer is the only copy there will ever be."""
    key = key or make_key()
    store.write_now(
        lambda connection: keys.add(
            connection,
            name=name,
            org=org,
            prefix=key[:8],
            hash_=hash_key(key),
            admin=admin,
            now=time.time(),
        )
    )
    return key


def first_key(store: Store, wanted: str | None) -> str | None:
    """Make the admin's key if there is none, or if `wanted` is not yet known. Answers a key that was
    made here and that nobody knows yet."""
    known = store.write_now(
        lambda connection: (
            keys.by_hash(connection, hash_key(wanted)) is not None if wanted else keys.any_usable(connection)
        )
    )
    if known:
        return None
    key = create_key(store, "admin", org="admin", admin=True, key=wanted)
    return None if wanted else key


class KeyRing:
    """Looks keys up, and remembers them for moments: a revoked key stops working within seconds."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[float, KeyRow | None]] = {}
        self._used: dict[str, float] = {}

    async def authenticate(self, key: str | None) -> Caller:
        if not key:
            raise Unauthorized("an API key is missing: set TINKER_API_KEY to a key of this server")
        row = await self._find(hash_key(key))
        if row is None or (row.expires_at is not None and row.expires_at <= time.time()):
            raise Unauthorized(
                "this API key is not valid here: set TINKER_API_KEY to a key of this server"
                " (its operator makes one with: tinsmith keys create NAME)"
            )
        self._used[row.id] = time.time()
        return Caller(
            key_id=row.id,
            org_id=row.org_id,
            org_name=row.org_name,
            user_id=row.user_id,
            user_name=row.user_name,
            user_email=row.user_email,
            role=row.role,
            scopes=row.scopes,
            project_id=row.project_id,
            admin=row.admin,
        )

    async def _find(self, hash_: str) -> KeyRow | None:
        now = time.monotonic()
        known = self._known.get(hash_)
        if known is not None and now - known[0] < _REMEMBERED:
            return known[1]
        row = await self._store.read(lambda connection: keys.by_hash(connection, hash_))
        if len(self._known) > 10_000:  # somebody tries keys
            self._known.clear()
        self._known[hash_] = (now, row)
        return row

    def flush(self) -> None:
        """Write down when keys were last used."""
        if self._used:
            used, self._used = self._used, {}
            self._store.write_soon(lambda connection: keys.touch(connection, used))
