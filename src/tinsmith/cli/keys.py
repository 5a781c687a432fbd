"""tinsmith keys: who may use the server."""

from __future__ import annotations

import argparse
import time

from tinsmith.service.access import SCOPES
from tinsmith.store.keys import KeyRow

from .office import Actions, Office, add_action, duration, moment, shown_time


def add_parser(commands: Actions) -> None:
    parser = commands.add_parser("keys", help="make, list, replace and revoke API keys")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = add_action(actions, "create", _create, "make a key and print it, once", org=False)
    create.add_argument("name", help="whom or what it is for")
    create.add_argument(
        "--org",
        help="the organization that it acts for, which is made where there is none (default: one of its own)",
    )
    create.add_argument(
        "--user", help="the user that it acts for, by address, name or id (default: one called as the key is)"
    )
    create.add_argument(
        "--scope",
        action="append",
        choices=list(SCOPES),
        help="what it may be used for; may be given several times (default: whatever its user may do)",
    )
    create.add_argument("--project", help="the one project that it is good for, by name or id")
    create.add_argument("--expires", type=moment, metavar="WHEN", help="30d, 12h, or 2027-01-31")
    create.add_argument("--note", help="a remark, which its user sees too")
    create.add_argument("--admin", action="store_true", help="an operator's: may see the server's status")
    list_ = add_action(actions, "list", _list, "list all keys; their secret parts are not stored", org=False)
    list_.add_argument("--org", help="only those of this organization")
    for name, run, help_ in (
        ("revoke", _revoke, "make a key invalid, within seconds"),
        ("rotate", _rotate, "make a key in another one's place and print it, once"),
    ):
        action = add_action(actions, name, run, help_, org=False)
        action.add_argument("key", help="the key's number, id or name as listed, or the key itself")
        action.add_argument("--org", help="the organization that it is of")
        if name == "rotate":
            action.add_argument(
                "--overlap",
                type=duration,
                default=0.0,
                metavar="SPAN",
                help="how long the old one stays valid, such as 24h (default: not at all)",
            )


def _create(arguments: argparse.Namespace, office: Office) -> None:
    new = office.keys.create(
        arguments.name,
        org=arguments.org or _free_org(office, arguments.name),
        user=arguments.user,
        admin=arguments.admin,
        scopes=frozenset(arguments.scope) if arguments.scope else None,
        project=arguments.project,
        expires_at=arguments.expires,
        note=arguments.note,
    )
    office.say(new.secret, {**_values(new.row), "key": new.secret})


def _free_org(office: Office, name: str) -> str:
    """An organization that there is not yet: keys share nothing unless told to."""
    taken = {org.name for org in office.people.orgs()}
    number = 1
    org = name
    while org in taken:
        number += 1
        org = f"{name}-{number}"
    return org


def _list(arguments: argparse.Namespace, office: Office) -> None:
    columns = {
        "number": "NO",
        "short_id": "ID",
        "name": "NAME",
        "org": "ORG",
        "user": "USER",
        "prefix": "KEY",
        "scopes": "SCOPES",
        "last_used_at": "LAST USED",
        "expires_at": "EXPIRES",
        "state": "STATE",
    }
    office.table([_values(row) for row in office.keys.all(arguments.org)], columns)


def _revoke(arguments: argparse.Namespace, office: Office) -> None:
    row = office.keys.revoke(arguments.key, arguments.org)
    office.say(f"revoked {row.name} ({row.id[:10]})", _values(row))


def _rotate(arguments: argparse.Namespace, office: Office) -> None:
    new = office.keys.rotate(arguments.key, arguments.org, arguments.overlap)
    office.say(new.secret, {**_values(new.row), "key": new.secret})


def _values(row: KeyRow) -> dict[str, object]:
    expired = row.expires_at is not None and row.expires_at <= time.time()
    ended = "revoked" if row.revoked_at is not None else "expired" if expired else None
    return {
        "id": row.id,
        "short_id": row.id[:10],
        "number": row.number,
        "name": row.name,
        "org": row.org_name,
        "user": row.user_email or row.user_name,
        "prefix": row.prefix + "...",
        "scopes": sorted(row.scopes) if row.scopes is not None else None,
        "project_id": row.project_id,
        "note": row.note,
        "created_at": shown_time(row.created_at),
        "last_used_at": shown_time(row.last_used_at),
        "expires_at": shown_time(row.expires_at),
        "state": ended or ("admin" if row.admin else "valid"),
    }
