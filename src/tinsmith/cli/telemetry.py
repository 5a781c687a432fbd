"""tinsmith telemetry: what the clients of a server told of themselves."""

from __future__ import annotations

import argparse
import time

from tinsmith.store import orgs, telemetry
from tinsmith.store.scope import SERVER, Scope
from tinsmith.store.telemetry import EventRow, SessionCount
from tinsmith.wire.telemetry import SEVERITIES

from .office import Actions, Office, Run, add_action, duration, shown_time

_SHOWN = 100  # characters of an event that the table has; --json has all of it


def add_parser(commands: Actions) -> None:
    parser = commands.add_parser("telemetry", help="show what clients told of themselves")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    events = _add(actions, "list", _events, "list the newest events")
    events.add_argument("--session", metavar="ID", help="only what this session told")
    events.add_argument("--severity", choices=SEVERITIES, help="only what is at least so severe")
    _add(actions, "sessions", _sessions, "list the sessions that told something last, with their errors")


def _add(actions: Actions, name: str, run: Run, help_: str) -> argparse.ArgumentParser:
    action = add_action(actions, name, run, help_, org=False)
    action.add_argument("--org", help="only this organization's, by name or id")
    action.add_argument("--since", type=duration, metavar="SPAN", help="only of the last 12h or 7d")
    action.add_argument("--limit", type=_limit, default=100, metavar="N", help="at most so many (100)")
    return action


def _events(arguments: argparse.Namespace, office: Office) -> None:
    severities = SEVERITIES[SEVERITIES.index(arguments.severity) :] if arguments.severity else None
    scope = _scope(arguments, office)
    rows = office.read(
        lambda connection: telemetry.newest(
            connection,
            scope,
            session_id=arguments.session,
            severities=severities,
            since=_since(arguments),
            limit=arguments.limit,
        )
    )
    names = _names(office)
    columns = {"at": "TIME", "org": "ORGANIZATION", "session_id": "SESSION", "severity": "SEVERITY"}
    office.table([_event(row, names) for row in rows], {**columns, "event": "EVENT", "what": "WHAT"})


def _sessions(arguments: argparse.Namespace, office: Office) -> None:
    scope = _scope(arguments, office)
    rows = office.read(
        lambda connection: telemetry.by_session(
            connection, scope, since=_since(arguments), limit=arguments.limit
        )
    )
    names = _names(office)
    columns = {"last_at": "LAST", "org": "ORGANIZATION", "session_id": "SESSION", "events": "EVENTS"}
    columns |= {"errors": "ERRORS", "sdk_version": "SDK", "platform": "PLATFORM"}
    office.table([_session(row, names) for row in rows], columns)


def _event(row: EventRow, names: dict[str, str]) -> dict[str, object]:
    details = row.known
    data = details.get("event_data")
    about = [details.get("error_type"), details.get("error_message")]
    about += [f"{key}={value}" for key, value in data.items()] if isinstance(data, dict) else []
    return {
        "at": shown_time(row.at),
        "received_at": shown_time(row.received_at),
        "org": names.get(row.org_id, row.org_id),
        "user_id": row.user_id,
        "key_id": row.key_id,
        "session_id": row.session_id,
        "process": row.process,
        "sdk_version": row.sdk_version,
        "platform": row.platform,
        "severity": row.severity,
        "event": row.name or row.type,
        "type": row.type,
        "place": row.place,
        "event_id": row.event_id,
        "details": details,
        "what": " ".join(str(part) for part in about if part)[:_SHOWN] or None,
    }


def _session(row: SessionCount, names: dict[str, str]) -> dict[str, object]:
    return {
        "last_at": shown_time(row.last_at),
        "org": names.get(row.org_id, row.org_id),
        "session_id": row.session_id,
        "events": row.events,
        "errors": row.errors,
        "sdk_version": row.sdk_version,
        "platform": row.platform,
    }


def _scope(arguments: argparse.Namespace, office: Office) -> Scope:
    """Of one organization where one is named; else of all of them."""
    return SERVER if arguments.org is None else Scope(office.org(arguments.org), "", None)


def _names(office: Office) -> dict[str, str]:
    return {row.id: row.name for row in office.read(orgs.every)}


def _since(arguments: argparse.Namespace) -> float:
    return time.time() - arguments.since if arguments.since is not None else 0.0


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 100000")
    return int(text)
