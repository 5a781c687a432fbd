"""What an operator does about keys: each act and its entry in the audit log are one transaction."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tinsmith.store import Connection, Store, keys, orgs, people
from tinsmith.store.keys import KeyRow
from tinsmith.store.orgs import OrgRow
from tinsmith.store.people import Role, UserRow

from .access import SCOPES
from .acts import Acts
from .audit import Actor, record
from .keys import hash_key, make_key
from .named import AdminError, check_name, the_key, the_org, the_project, the_user


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made. `secret` is the only copy that there will ever be."""

    secret: str
    row: KeyRow


class KeyAdministration(Acts):
    def all(self, org: str | None) -> list[KeyRow]:
        def work(connection: Connection) -> list[KeyRow]:
            org_id = the_org(connection, org).id if org is not None else None
            return [row for row in keys.every(connection) if org_id in (None, row.org_id)]

        return self._do(work)

    def create(
        self,
        name: str,
        *,
        org: str,
        user: str | None = None,
        admin: bool = False,
        scopes: frozenset[str] | None = None,
        project: str | None = None,
        expires_at: float | None = None,
        note: str | None = None,
        secret: str | None = None,
    ) -> NewKey:
        """A key of `user`, or without one of the member called as the key is, who is made where there is
        none. An organization that there is not is made, too; its first user looks after it."""

        def work(connection: Connection) -> NewKey:
            now = time.time()
            check_name(name)
            unknown = sorted((scopes or frozenset()) - SCOPES.keys())
            if unknown:
                raise AdminError(f"there is no scope {unknown[0]!r}; there are {', '.join(SCOPES)}")
            if expires_at is not None and expires_at <= now:
                raise AdminError("a key cannot expire before it is made")
            owner = orgs.find(connection, org)
            if owner is None:
                check_name(org)
                owner = orgs.add(connection, org, now)
                record(
                    connection,
                    self._actor,
                    owner.id,
                    "organization",
                    "create",
                    {"organization_name": org},
                )
            if user is not None:
                whose = the_user(connection, owner.id, user)
            else:
                whose = self._user_of_key(connection, owner, name, admin, now)
            project_id = the_project(connection, owner.id, project).id if project is not None else None
            key = secret or make_key()
            row = keys.add(
                connection,
                org_id=owner.id,
                user_id=whose.id,
                name=name,
                prefix=key[:8],
                hash_=hash_key(key),
                now=now,
                admin=admin,
                scopes=scopes,
                project_id=project_id,
                expires_at=expires_at,
                note=note,
            )
            self._note_key(connection, row, "create", {"user_id": whose.id, **_limits(row)})
            return NewKey(key, row)

        return self._do(work)

    def _user_of_key(
        self, connection: Connection, org: OrgRow, name: str, admin: bool, now: float
    ) -> UserRow:
        members = people.members(connection, org.id)
        named = [member for member in members if member.name == name]
        if named:
            return named[0]
        role: Role = "admin" if admin or not members else "member"
        user = people.add(connection, org.id, name, None, role, now)
        assert user is not None
        about = {"user_id": user.id, "user_name": user.name, "user_email": user.email}
        record(connection, self._actor, org.id, "user", "create", about, {"role": role})
        return user

    def revoke(self, wanted: str, org: str | None = None) -> KeyRow:
        def work(connection: Connection) -> KeyRow:
            row = the_key(connection, wanted, org)
            keys.revoke(connection, row.id, time.time())
            self._note_key(connection, row, "revoke", {})
            return row

        return self._do(work)

    def rotate(self, wanted: str, org: str | None = None, overlap: float = 0.0) -> NewKey:
        """Another key in place of one, which ends at once or after `overlap` seconds. A key that expires
        gets one that lives as long as it."""

        def work(connection: Connection) -> NewKey:
            now = time.time()
            old = the_key(connection, wanted, org)
            key = make_key()
            lifetime = old.expires_at - old.created_at if old.expires_at is not None else None
            row = keys.add(
                connection,
                org_id=old.org_id,
                user_id=old.user_id,
                name=old.name,
                prefix=key[:8],
                hash_=hash_key(key),
                now=now,
                admin=old.admin,
                scopes=old.scopes,
                project_id=old.project_id,
                expires_at=now + lifetime if lifetime is not None else None,
                note=old.note,
            )
            if overlap > 0:
                ends = now + overlap
                keys.set_expiry(connection, old.id, min(ends, old.expires_at or ends))
            else:
                keys.revoke(connection, old.id, now)
            self._note_key(connection, old, "rotate", {"new_key_id": row.id, "overlap_seconds": overlap})
            return NewKey(key, row)

        return self._do(work)

    def _note_key(self, connection: Connection, row: KeyRow, act: str, how: dict[str, object]) -> None:
        about = {"api_key_id": row.id, "api_key_name": row.name, "api_key_prefix": row.prefix}
        record(connection, self._actor, row.org_id, "api_key", act, about, how)


def _limits(row: KeyRow) -> dict[str, object]:
    """What a key was narrowed to."""
    return {
        "scopes": sorted(row.scopes) if row.scopes is not None else None,
        "project_id": row.project_id,
        "expires_at": row.expires_at,
        "operator": row.admin,
    }


def first_key(store: Store, wanted: str | None) -> str | None:
    """Make the operator's key if there is no usable one, or if `wanted` was never known here: one that
    was revoked does not come back. Answers a key that was made here and that nobody knows yet."""

    def known(connection: Connection) -> bool:
        if wanted is not None:
            return keys.id_of(connection, hash_key(wanted)) is not None
        return keys.any_usable(connection, time.time())

    if store.write_now(known):
        return None
    administration = KeyAdministration(store, Actor({"type": "server"}))
    new = administration.create("admin", org="admin", admin=True, secret=wanted)
    return None if wanted else new.secret
