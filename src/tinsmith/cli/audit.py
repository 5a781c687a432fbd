"""tinsmith audit: who did what, when, with which key."""

from __future__ import annotations

import argparse
from datetime import UTC, date, datetime, timedelta
from typing import get_args

from tinsmith.store.audit import AuditRow, EventType

from .office import Actions, Office, add_action, shown_time


def add_parser(commands: Actions) -> None:
    audit = add_action(commands, "audit", _audit, "print an organization's audit log of one day")
    audit.add_argument("--day", type=_day, help="2027-01-31, in UTC (default: today)")
    audit.add_argument("--type", choices=get_args(EventType), help="only what is about these")


def _audit(arguments: argparse.Namespace, office: Office) -> None:
    day = arguments.day or datetime.now(UTC).date()
    since = datetime(day.year, day.month, day.day, tzinfo=UTC)
    until = since + timedelta(days=1)
    rows = office.people.audit(
        office.org(arguments.org), since.timestamp(), until.timestamp(), arguments.type
    )
    columns = {"timestamp": "TIME", "event": "EVENT", "who": "WHO", "what": "WHAT", "outcome": "OUTCOME"}
    office.table([_values(row) for row in rows], columns)


def _values(row: AuditRow) -> dict[str, object]:
    actor = row.details["actor"]
    kind = actor["type"]
    who = actor.get("email") or actor.get("name") or kind
    known = ("organization_urn", "actor", "resource", "action", "outcome")
    about = {name: value for name, value in row.details.items() if name not in known}
    named = [str(value) for name, value in about.items() if name.endswith(("_name", "tinker_path"))]
    return {
        "timestamp": shown_time(row.at),
        "event": row.event,
        "who": f"{who} ({kind})" if kind != "user" else who,
        "what": ", ".join(named or [str(value) for value in about.values()]),
        "outcome": row.outcome,
        "event_details": row.details,
    }


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day; write 2027-01-31") from None
