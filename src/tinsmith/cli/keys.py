"""tinsmith keys: who may use the server."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime

from tinsmith.service.keys import create_key, hash_key
from tinsmith.store import Store, keys
from tinsmith.store.keys import KeyRow

from .options import add_settings, read_settings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("keys", help="make, list and revoke API keys")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key and print it, once")
    create.add_argument("name", help="whom or what it is for")
    create.add_argument(
        "--org",
        help="the organization that it acts for, whose keys share everything (default: one of its own)",
    )
    create.add_argument("--admin", action="store_true", help="may see the server's status")
    list_ = actions.add_parser("list", help="list all keys; their secret parts are not stored")
    revoke = actions.add_parser("revoke", help="make a key invalid, within seconds")
    revoke.add_argument("key", help="the key's id or name as listed, or the key itself")
    for action, run in ((create, _create), (list_, _list), (revoke, _revoke)):
        add_settings(action, only=("data",))
        action.set_defaults(run=run)


def _open(arguments: argparse.Namespace) -> Store:
    data = read_settings(arguments).data
    data.mkdir(parents=True, exist_ok=True)
    return Store.open(Store.local_url(data))


def _create(arguments: argparse.Namespace) -> int:
    store = _open(arguments)
    org = arguments.org or _free_org(store.write_now(keys.every), arguments.name)
    print(create_key(store, arguments.name, org=org, admin=arguments.admin))
    store.close()
    return 0


def _free_org(rows: list[KeyRow], name: str) -> str:
    """An organization that nobody is in yet: keys share nothing unless told to."""
    taken = {row.org_name for row in rows}
    number = 1
    org = name
    while org in taken:
        number += 1
        org = f"{name}-{number}"
    return org


def _list(arguments: argparse.Namespace) -> int:
    store = _open(arguments)
    rows = store.write_now(keys.every)
    store.close()
    print(f"{'ID':10} {'NAME':20} {'ORG':20} {'KEY':12} {'CREATED':17} {'LAST USED':17} STATE")
    for row in rows:
        state = "revoked" if row.revoked_at is not None else "admin" if row.admin else "valid"
        print(
            f"{row.id[:10]:10} {row.name[:20]:20} {row.org_name[:20]:20} {row.prefix + '...':12}"
            f" {_time(row.created_at):17} {_time(row.last_used_at):17} {state}"
        )
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    store = _open(arguments)
    by_secret = store.write_now(lambda connection: keys.by_hash(connection, hash_key(arguments.key)))
    found = [
        row
        for row in store.write_now(keys.every)
        if row.revoked_at is None
        and (
            row.id.startswith(arguments.key)
            or row.name == arguments.key
            or (by_secret is not None and row.id == by_secret.id)
        )
    ]
    if len(found) != 1:
        problem = "no valid key" if not found else f"{len(found)} valid keys"
        print(f"tinsmith: {problem} called {arguments.key!r}; see: tinsmith keys list", file=sys.stderr)
        store.close()
        return 1
    store.write_now(lambda connection: keys.revoke(connection, found[0].id, time.time()))
    store.close()
    print(f"revoked {found[0].name} ({found[0].id[:10]})")
    return 0


def _time(seconds: float | None) -> str:
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
