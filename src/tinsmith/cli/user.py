"""tinsmith user: who belongs to an organization, and as what."""

from __future__ import annotations

import argparse
from typing import get_args

from tinsmith.store.people import Role, UserRow

from .office import Actions, Office, add_action, add_yes, needs_yes, shown_time


def add_parser(commands: Actions) -> None:
    parser = commands.add_parser("user", help="add, list and remove an organization's users")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = add_action(actions, "create", _create, "add a user to an organization")
    create.add_argument("user", help="an e-mail address, or a name")
    create.add_argument("--name", help="what to call the user (default: what is before the @)")
    create.add_argument("--role", choices=get_args(Role), default="member", help="in the organization")
    add_action(actions, "list", _list, "list an organization's users")
    show = add_action(actions, "show", _show, "what a user may do, and its keys")
    show.add_argument("user", help="e-mail address, name or id")
    role = add_action(actions, "role", _role, "set a user's role in the organization")
    role.add_argument("user", help="e-mail address, name or id")
    role.add_argument("role", choices=get_args(Role))
    for name, run, help_ in (
        ("disable", _disable, "let none of a user's keys in, in any organization, until it is enabled again"),
        ("enable", _enable, "let a user's keys in again"),
        ("delete", _delete, "end a user's membership and revoke its keys; what it made stays"),
    ):
        action = add_action(actions, name, run, help_)
        action.add_argument("user", help="e-mail address, name or id")
        if name == "delete":
            add_yes(action)


def _create(arguments: argparse.Namespace, office: Office) -> None:
    email = arguments.user if "@" in arguments.user else None
    name = arguments.name or arguments.user.partition("@")[0] or arguments.user
    user = office.people.create_user(office.org(arguments.org), name, email, arguments.role)
    office.say(f"added {user.shown} as {user.role} ({user.id})", _values(user))


def _list(arguments: argparse.Namespace, office: Office) -> None:
    rows = [_values(user) for user in office.people.users(office.org(arguments.org))]
    columns = {"id": "ID", "name": "NAME", "email": "E-MAIL", "role": "ROLE", "state": "STATE"}
    office.table(rows, columns)


def _show(arguments: argparse.Namespace, office: Office) -> None:
    org = office.org(arguments.org)
    user = office.people.user(org, arguments.user)
    keys = [key for key in office.keys.all(org) if key.user_id == user.id and key.revoked_at is None]
    office.sheet(
        {
            **_values(user),
            "projects": [
                f"{project.name} ({', '.join(sorted(roles))})"
                for project, roles in office.people.roles_of(user)
                if roles
            ],
            "keys": [key.name for key in keys],
        }
    )


def _role(arguments: argparse.Namespace, office: Office) -> None:
    user = office.people.set_role(office.org(arguments.org), arguments.user, arguments.role)
    office.say(f"{user.shown} is {user.role} now", _values(user))


def _disable(arguments: argparse.Namespace, office: Office) -> None:
    user = office.people.disable_user(office.org(arguments.org), arguments.user, True)
    office.say(f"{user.shown} is disabled; its keys stop working within seconds", _values(user))


def _enable(arguments: argparse.Namespace, office: Office) -> None:
    user = office.people.disable_user(office.org(arguments.org), arguments.user, False)
    office.say(f"{user.shown} is enabled", _values(user))


def _delete(arguments: argparse.Namespace, office: Office) -> None:
    org = office.org(arguments.org)
    user = office.people.user(org, arguments.user)
    needs_yes(arguments, f"deleting {user.shown} revokes its keys")
    office.people.remove_user(org, user.id)
    office.say(f"deleted {user.shown}", _values(user))


def _values(user: UserRow) -> dict[str, object]:
    return {
        "id": user.id,
        "name": user.name,
        "email": user.email,
        "role": user.role,
        "created_at": shown_time(user.created_at),
        "state": "disabled" if user.disabled_at is not None else "enabled",
    }
