"""API keys, and the tokens that they are exchanged for: who is calling."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass

from tinsmith.store import Connection, Store, keys, projects
from tinsmith.store.keys import KeyRow

from .access import ORG_RIGHTS, PROJECT_RIGHTS, left_by
from .audit import Actor, record
from .caller import Caller
from .errors import InvalidToken, Unauthorized
from .identity import Identities, is_token

PREFIX = "tml-"
_REMEMBERED = 2.0  # seconds for which a key that was looked up is taken for valid
_MOST_REMEMBERED = 10_000


def make_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """Looks keys up, and remembers them for moments: a revoked key stops working within seconds, and so
    do the tokens that it was exchanged for."""

    def __init__(self, store: Store, identities: Identities) -> None:
        self._store = store
        self._identities = identities
        self._known: dict[str, _Known] = {}
        self._used: dict[str, float] = {}

    async def authenticate(self, credential: str | None) -> Caller:
        """Whose key or token this is. Raises Unauthorized."""
        if not credential:
            raise Unauthorized("an API key is missing: set TINKER_API_KEY to a key of this server")
        if is_token(credential):
            identity = self._identities.read(credential)
            known = await self._find(id_=identity.key_id) if identity is not None else None
            if known is None or known.caller is None or known.has_expired:
                raise InvalidToken("this token is not valid here (any more); exchange a key for a new one")
        else:
            known = await self._find(hash_=hash_key(credential))
            if known.caller is None:
                raise Unauthorized(
                    "this API key is not valid here: set TINKER_API_KEY to a key of this server"
                    " (its operator makes one with: tinsmith keys create NAME)"
                )
            if known.has_expired:
                raise Unauthorized(
                    "this API key has expired; the server's operator makes another with: tinsmith keys create"
                )
        self._used[known.caller.key_id] = time.time()
        return known.caller

    async def token(self, credential: str | None) -> str:
        """A token in exchange for a key. One for another token ends with that."""
        caller = await self.authenticate(credential)
        known = await self._find(id_=caller.key_id)
        ends = [known.expires_at]
        if credential is not None and is_token(credential):
            identity = self._identities.read(credential)
            ends.append(identity.expires_at if identity is not None else 0.0)
        return self._identities.issue(caller, min((end for end in ends if end is not None), default=None))

    async def row(self, caller: Caller) -> KeyRow:
        row = await self._store.read(lambda connection: keys.usable(connection, id_=caller.key_id))
        if row is None:
            raise Unauthorized("this API key is not valid here any more")
        return row

    async def revoke_own(self, caller: Caller) -> None:
        """A key ends itself."""
        row = await self.row(caller)

        def work(connection: Connection) -> None:
            keys.revoke(connection, row.id, time.time())
            about = {"api_key_id": row.id, "api_key_name": row.name, "api_key_prefix": row.prefix}
            record(connection, Actor.of(caller), row.org_id, "api_key", "revoke", about)

        await self._store.write(work)
        self.forget(row.id)

    def forget(self, key_id: str) -> None:
        """A key was changed just now: look it up anew."""
        for name in [n for n, known in self._known.items() if known.key_id == key_id]:
            del self._known[name]

    async def _find(self, *, hash_: str | None = None, id_: str | None = None) -> _Known:
        now = time.monotonic()
        name = hash_ if hash_ is not None else f"id {id_}"
        known = self._known.get(name)
        if known is not None and now - known.looked_up < _REMEMBERED:
            return known

        def look(connection: Connection) -> _Known:
            row = keys.usable(connection, hash_=hash_, id_=id_)
            if row is None:
                return _Known(now, None, None, None)
            return _Known(now, row.id, _caller(connection, row), row.expires_at)

        known = await self._store.read(look)
        if len(self._known) > _MOST_REMEMBERED:  # somebody tries keys
            self._known.clear()
        self._known[name] = known
        return known

    def flush(self) -> None:
        """Write down when keys were last used."""
        if self._used:
            used, self._used = self._used, {}
            self._store.write_soon(lambda connection: keys.touch(connection, used))


@dataclass(frozen=True, slots=True)
class _Known:
    looked_up: float  # monotonic
    key_id: str | None
    caller: Caller | None
    expires_at: float | None

    @property
    def has_expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= time.time()


def _caller(connection: Connection, key: KeyRow) -> Caller:
    """What a key's holder may do now."""
    assert key.role is not None  # or the key could not be used
    usable = left_by(key.scopes)
    rights: dict[str, frozenset[str]] = {}
    home = key.project_id or ""
    for project, roles in projects.roles_of(connection, key.org_id, key.user_id):
        if project.is_default and not home:
            home = project.id
        if key.project_id not in (None, project.id):
            continue
        if key.role == "admin":
            roles = {"admin"}
        allowed = frozenset[str]().union(*(PROJECT_RIGHTS[role] for role in roles))
        if project.archived_at is not None:
            allowed &= {"see"}
        rights[project.id] = allowed & usable
    bound = key.project_id is not None
    return Caller(
        key_id=key.id,
        org_id=key.org_id,
        org_name=key.org_name,
        user_id=key.user_id,
        user_name=key.user_name,
        user_email=key.user_email,
        role=key.role,
        scopes=key.scopes,
        project_id=key.project_id,
        admin=key.admin,
        home=home,
        rights=rights,
        elsewhere=PROJECT_RIGHTS["admin"] & usable if key.role == "admin" and not bound else frozenset(),
        org_rights=frozenset() if bound else ORG_RIGHTS[key.role] & usable,
    )
