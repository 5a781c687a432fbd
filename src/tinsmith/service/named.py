"""What operators call things by: organizations, users, teams, projects and keys by their ids or names."""

from __future__ import annotations

import unicodedata

from tinsmith.store import Connection, keys, orgs, people, projects, teams
from tinsmith.store.keys import KeyRow
from tinsmith.store.orgs import OrgRow
from tinsmith.store.people import UserRow
from tinsmith.store.projects import ProjectRow
from tinsmith.store.teams import TeamRow

from .keys import hash_key

_LONGEST = 256
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # the direction of text


class AdminError(Exception):
    """It cannot be done; the message says why, and what would be right."""


def check_name(name: str) -> None:
    if not name.strip() or len(name) > _LONGEST or any(_controls(letter) for letter in name):
        raise AdminError(f"a name must have 1 to {_LONGEST} characters, none of them a control character")


def _controls(letter: str) -> bool:
    """Whether it does something to a terminal or a log: starts a sequence or a line, or turns text around."""
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _TURNS


def the_org(connection: Connection, wanted: str) -> OrgRow:
    org = orgs.find(connection, wanted)
    if org is None:
        raise AdminError(f"there is no organization {wanted!r}; see: tinsmith org list")
    return org


def the_user(connection: Connection, org: str, wanted: str) -> UserRow:
    row = the_org(connection, org)
    found = people.find(connection, row.id, wanted)
    if not found:
        raise AdminError(f"{row.name} has no user {wanted!r}; see: tinsmith user list --org {row.name!r}")
    if len(found) > 1:
        raise AdminError(f"{row.name} has {len(found)} users called {wanted!r}; give an id or an address")
    return found[0]


def the_team(connection: Connection, org: str, wanted: str) -> TeamRow:
    row = the_org(connection, org)
    team = teams.find(connection, row.id, wanted)
    if team is None:
        raise AdminError(f"{row.name} has no team {wanted!r}; see: tinsmith team list --org {row.name!r}")
    return team


def the_project(connection: Connection, org: str, wanted: str) -> ProjectRow:
    row = the_org(connection, org)
    project = projects.find(connection, row.id, wanted)
    if project is None:
        raise AdminError(
            f"{row.name} has no project {wanted!r}; see: tinsmith project list --org {row.name!r}"
        )
    return project


def the_key(connection: Connection, wanted: str, org: str | None) -> KeyRow:
    """A valid key by its number, its id or the beginning of that, its name, or itself."""
    org_id = the_org(connection, org).id if org is not None else None
    itself = keys.id_of(connection, hash_key(wanted))
    found = [
        row
        for row in keys.every(connection)
        if row.revoked_at is None
        and org_id in (None, row.org_id)
        and (
            row.id == itself
            or row.name == wanted
            or str(row.number) == wanted
            or (len(wanted) >= 6 and row.id.startswith(wanted))
        )
    ]
    if len(found) != 1:
        problem = "no valid key" if not found else f"{len(found)} valid keys"
        raise AdminError(f"{problem} called {wanted!r}; see: tinsmith keys list")
    return found[0]
