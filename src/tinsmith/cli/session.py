"""tinsmith session: see what an organization's clients have open, and end it."""

from __future__ import annotations

import argparse

from tinsmith.store.sessions import SessionRow

from .office import Actions, Office, add_action, shown_time

_COLUMNS = {
    "id": "ID",
    "name": "NAME",
    "created_at": "BEGAN",
    "finished_at": "ENDED",
    "end": "HOW",
    "detail": "WHY",
}


def add_parser(commands: Actions) -> None:
    parser = commands.add_parser("session", help="list and cancel clients' sessions")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    list_ = add_action(actions, "list", _list, "list an organization's newest sessions")
    list_.add_argument("--count", type=_count, default=50, help="how many (default: 50)")
    cancel = add_action(
        actions, "cancel", _cancel, "end a session: what it has waiting is given up; checkpoints stay"
    )
    cancel.add_argument("session", help="its id")
    cancel.add_argument("--reason", help="told to its client, and shown as its status")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 100_000):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 100000")
    return int(text)


def _list(arguments: argparse.Namespace, office: Office) -> None:
    rows = office.sessions.newest(office.org(arguments.org), arguments.count)
    office.table([_values(row) for row in rows], _COLUMNS)


def _cancel(arguments: argparse.Namespace, office: Office) -> None:
    row = office.sessions.cancel(office.org(arguments.org), arguments.session, arguments.reason)
    office.say(f"cancelled {row.id}; a running server ends its work within seconds", _values(row))


def _values(row: SessionRow) -> dict[str, object]:
    return {
        "id": row.id,
        "name": row.display_name,
        "created_at": shown_time(row.created_at),
        "finished_at": shown_time(row.finished_at),
        "end": row.finish_reason,
        "detail": row.finish_detail,
        "project_id": row.project_id,
        "user_id": row.user_id,
    }
