"""tinsmith org: organizations, which share nothing with each other."""

from __future__ import annotations

import argparse

from tinsmith.store.orgs import OrgRow

from .office import Actions, Office, add_action, add_yes, needs_yes, shown_time


def add_parser(commands: Actions) -> None:
    parser = commands.add_parser("org", help="make, list and end organizations")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = add_action(actions, "create", _create, "make an organization", org=False)
    create.add_argument("name")
    add_action(actions, "list", _list, "list all organizations", org=False)
    show = add_action(actions, "show", _show, "what is in an organization", org=False)
    show.add_argument("name", help="its name or id")
    rename = add_action(actions, "rename", _rename, "give an organization another name", org=False)
    rename.add_argument("name", help="its name or id")
    rename.add_argument("new_name", metavar="NEW_NAME")
    for name, run, help_ in (
        ("disable", _disable, "let none of an organization's keys in, until it is enabled again"),
        ("enable", _enable, "let an organization's keys in again"),
        ("delete", _delete, "revoke an organization's keys and delete its checkpoints"),
    ):
        action = add_action(actions, name, run, help_, org=False)
        action.add_argument("name", help="its name or id")
        if name == "delete":
            add_yes(action)


def _create(arguments: argparse.Namespace, office: Office) -> None:
    org = office.people.create_org(arguments.name)
    office.say(f"made the organization {org.name} ({org.id})", _values(org))


def _list(arguments: argparse.Namespace, office: Office) -> None:
    rows = [_values(org) for org in office.people.orgs()]
    office.table(rows, {"id": "ID", "name": "NAME", "created_at": "CREATED", "state": "STATE"})


def _show(arguments: argparse.Namespace, office: Office) -> None:
    org = office.people.org(arguments.name)
    office.sheet(
        {
            **_values(org),
            "users": [f"{user.shown} ({user.role})" for user in office.people.users(org.id)],
            "projects": [project.name for project in office.people.projects(org.id)],
            "teams": [team.name for team, _ in office.people.teams(org.id)],
            "keys": [key.name for key in office.keys.all(org.id) if key.revoked_at is None],
        }
    )


def _rename(arguments: argparse.Namespace, office: Office) -> None:
    org = office.people.rename_org(arguments.name, arguments.new_name)
    office.say(f"{arguments.name} is called {org.name} now", _values(org))


def _disable(arguments: argparse.Namespace, office: Office) -> None:
    org = office.people.disable_org(arguments.name, True)
    office.say(f"{org.name} is disabled; its keys stop working within seconds", _values(org))


def _enable(arguments: argparse.Namespace, office: Office) -> None:
    org = office.people.disable_org(arguments.name, False)
    office.say(f"{org.name} is enabled", _values(org))


def _delete(arguments: argparse.Namespace, office: Office) -> None:
    org = office.people.org(arguments.name)
    needs_yes(arguments, f"deleting {org.name} revokes its keys and deletes its checkpoints")
    office.people.delete_org(org.id)
    office.say(f"deleted {org.name}; a running server sweeps its checkpoints within a minute", _values(org))


def _values(org: OrgRow) -> dict[str, object]:
    return {
        "id": org.id,
        "name": org.name,
        "created_at": shown_time(org.created_at),
        "state": "disabled" if org.disabled_at is not None else "enabled",
    }
