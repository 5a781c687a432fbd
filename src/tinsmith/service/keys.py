"""API keys: who is calling."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

from tinsmith.store import Connection, Store, keys, projects
from tinsmith.store.keys import KeyRow
from tinsmith.store.people import Role
from tinsmith.store.scope import Scope

from .access import ORG_RIGHTS, PROJECT_RIGHTS, OrgRight, Right, left_by
from .errors import Forbidden, Unauthorized
from .limits import Who

PREFIX = "tml-"
_REMEMBERED = 5.0  # seconds for which a key that was looked up is taken for valid


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is, and what it may do."""

    key_id: str
    org_id: str
    org_name: str
    user_id: str
    user_name: str
    user_email: str | None
    role: Role
    scopes: frozenset[str] | None  # None: whatever the user may do
    project_id: str | None  # the one project that the key is good for; None: all of the user's
    admin: bool  # an operator of this server
    home: str  # the project of what names none
    rights: Mapping[str, frozenset[str]]  # by project
    elsewhere: frozenset[str]  # in projects that are not in `rights`
    org_rights: frozenset[str]

    @property
    def who(self) -> Who:
        """Whose call this is, where it belongs to no session."""
        return Who(self.org_id, self.project_id or "", "", self.user_id, self.key_id)

    def may(self, project_id: str, right: Right) -> bool:
        return right in self.rights.get(project_id, self.elsewhere)

    def scope(self, right: Right = "see") -> Scope:
        """Where the caller has a right. Who may only sample in a project sees there what is its own."""
        if right in self.elsewhere:
            return Scope(self.org_id, self.user_id, None)
        having = frozenset(id_ for id_, rights in self.rights.items() if right in rights)
        own = frozenset(id_ for id_, rights in self.rights.items() if "sample" in rights) - having
        return Scope(self.org_id, self.user_id, having, own if right == "see" else frozenset())

    def require(self, project_id: str, right: Right) -> None:
        """Raises Forbidden where the caller may not do this in a project that it knows of."""
        if not self.may(project_id, right):
            raise Forbidden(f"this needs {_NEEDED[right]} in the project {project_id}; {self._why()}")

    def require_org(self, right: OrgRight) -> None:
        if right not in self.org_rights:
            raise Forbidden(f"this needs {_NEEDED_OF_ORG[right]}; {self._why()}")

    def _why(self) -> str:
        whose = f"this key belongs to {self.user_email or self.user_name}, {self.role} of {self.org_name}"
        if self.scopes is not None:
            whose += f", and is limited to {', '.join(sorted(self.scopes)) or 'nothing'}"
        return whose


_NEEDED: dict[Right, str] = {
    "see": "the role viewer",
    "sample": "the role sampler",
    "work": "the role member",
    "manage": "the role admin",
}
_NEEDED_OF_ORG: dict[OrgRight, str] = {
    "billing": "the organization's role billing-admin or admin",
    "audit": "the organization's role admin",
    "manage": "the organization's role admin",
}


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


def _caller(connection: Connection, key: KeyRow) -> Caller:
    """What a key's holder may do now."""
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


class KeyRing:
    """Looks keys up, and remembers them for moments: a revoked key stops working within seconds."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, _Known] = {}
        self._used: dict[str, float] = {}

    async def authenticate(self, key: str | None) -> Caller:
        if not key:
            raise Unauthorized("an API key is missing: set TINKER_API_KEY to a key of this server")
        known = await self._find(hash_key(key))
        if known.caller is None:
            raise Unauthorized(
                "this API key is not valid here: set TINKER_API_KEY to a key of this server"
                " (its operator makes one with: tinsmith keys create NAME)"
            )
        if known.expires_at is not None and known.expires_at <= time.time():
            raise Unauthorized(
                "this API key has expired; its operator makes another with: tinsmith keys create"
            )
        self._used[known.caller.key_id] = time.time()
        return known.caller

    async def _find(self, hash_: str) -> _Known:
        now = time.monotonic()
        known = self._known.get(hash_)
        if known is not None and now - known.looked_up < _REMEMBERED:
            return known

        def look(connection: Connection) -> _Known:
            row = keys.by_hash(connection, hash_)
            if row is None:
                return _Known(now, None, None)
            return _Known(now, _caller(connection, row), row.expires_at)

        known = await self._store.read(look)
        if len(self._known) > 10_000:  # somebody tries keys
            self._known.clear()
        self._known[hash_] = known
        return known

    def flush(self) -> None:
        """Write down when keys were last used."""
        if self._used:
            used, self._used = self._used, {}
            self._store.write_soon(lambda connection: keys.touch(connection, used))


@dataclass(frozen=True, slots=True)
class _Known:
    looked_up: float  # monotonic
    caller: Caller | None
    expires_at: float | None
