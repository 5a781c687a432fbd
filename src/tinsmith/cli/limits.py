"""tinsmith limits: budgets, rates, and how much at once, of organizations and projects."""

from __future__ import annotations

import argparse

from tinsmith.service.limits import ABOUT
from tinsmith.service.prices import plain

from .office import Actions, Office, add_action

_LIST = "; ".join(f"{name}: {about}" for name, about in ABOUT.items())


def add_parser(commands: Actions) -> None:
    parser = commands.add_parser(
        "limits", help="set and show what organizations and projects may use", epilog=_LIST
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = add_action(actions, "show", _show, "show the limits that hold")
    set_ = add_action(actions, "set", _set, "set a limit; a running server goes by it within seconds")
    set_.epilog = _LIST
    set_.add_argument("name", metavar="LIMIT", help=", ".join(ABOUT))
    set_.add_argument("value", metavar="VALUE")
    unset = add_action(actions, "unset", _unset, "take a limit away")
    unset.add_argument("name", metavar="LIMIT")
    for action in (set_, unset):
        action.add_argument("--project", help="only in this project, by name or id")
    for action in (show, set_, unset):
        action.add_argument(
            "--default", action="store_true", help="for all organizations that have no value of their own"
        )


def _org(arguments: argparse.Namespace, office: Office) -> str | None:
    return None if arguments.default else office.org(arguments.org)


def _show(arguments: argparse.Namespace, office: Office) -> None:
    org = _org(arguments, office)
    columns = {"limit": "LIMIT", "value": "VALUE"}
    if org is None:
        common: list[dict[str, object]] = [
            {"limit": row.name, "value": plain(row.value)} for row in office.limits.defaults()
        ]
        office.table(common, columns)
        return
    rows: list[dict[str, object]] = [
        {
            "limit": row.name,
            "project": row.project,
            "value": plain(row.value),
            "used": plain(row.used) if row.used is not None else None,
            "default": row.default,
        }
        for row in office.limits.show(org)
    ]
    office.table(rows, {**columns, "project": "PROJECT", "used": "USED", "default": "DEFAULT"})


def _set(arguments: argparse.Namespace, office: Office) -> None:
    org = _org(arguments, office)
    row = office.limits.set(org, arguments.project, arguments.name, arguments.value)
    assert row is not None
    office.say(
        f"{row.name} is {plain(row.value)} {_where(arguments)}",
        {"limit": row.name, "value": plain(row.value), "project": arguments.project, "org": org},
    )


def _unset(arguments: argparse.Namespace, office: Office) -> None:
    org = _org(arguments, office)
    office.limits.set(org, arguments.project, arguments.name, None)
    office.say(
        f"{arguments.name} is not set any more {_where(arguments)}",
        {"limit": arguments.name, "value": None, "project": arguments.project, "org": org},
    )


def _where(arguments: argparse.Namespace) -> str:
    if arguments.default:
        return "for organizations without a value of their own"
    whose = f"organization {arguments.org}" if arguments.org else "the organization"
    return f"in project {arguments.project} of {whose}" if arguments.project else f"for {whose}"
