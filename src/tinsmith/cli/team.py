"""tinsmith team: users that get roles in projects together."""

from __future__ import annotations

import argparse

from tinsmith.store.teams import TeamRow

from .office import Actions, Office, add_action


def add_parser(commands: Actions) -> None:
    parser = commands.add_parser("team", help="make, list and change teams of users")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = add_action(actions, "create", _create, "make a team")
    create.add_argument("name")
    add_action(actions, "list", _list, "list an organization's teams")
    for name, run, help_ in (("add", _add, "add a user to a team"), ("remove", _remove, "take a user out")):
        action = add_action(actions, name, run, help_)
        action.add_argument("team", help="name or id")
        action.add_argument("user", help="e-mail address, name or id")
    delete = add_action(actions, "delete", _delete, "delete a team, and its roles in projects")
    delete.add_argument("team", help="name or id")


def _create(arguments: argparse.Namespace, office: Office) -> None:
    team = office.people.create_team(office.org(arguments.org), arguments.name)
    office.say(f"made the team {team.name} ({team.id})", _values(team))


def _list(arguments: argparse.Namespace, office: Office) -> None:
    rows = [
        {**_values(team), "users": [user.shown for user in users]}
        for team, users in office.people.teams(office.org(arguments.org))
    ]
    office.table(rows, {"id": "ID", "name": "NAME", "users": "USERS"})


def _add(arguments: argparse.Namespace, office: Office) -> None:
    team = office.people.change_team(office.org(arguments.org), arguments.team, arguments.user, True)
    office.say(f"{arguments.user} is in the team {team.name}", _values(team))


def _remove(arguments: argparse.Namespace, office: Office) -> None:
    team = office.people.change_team(office.org(arguments.org), arguments.team, arguments.user, False)
    office.say(f"{arguments.user} is not in the team {team.name} any more", _values(team))


def _delete(arguments: argparse.Namespace, office: Office) -> None:
    team = office.people.delete_team(office.org(arguments.org), arguments.team)
    office.say(f"deleted the team {team.name}", _values(team))


def _values(team: TeamRow) -> dict[str, object]:
    return {"id": team.id, "name": team.name}
