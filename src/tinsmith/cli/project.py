"""tinsmith project: what an organization's work lies in, and who may do what there."""

from __future__ import annotations

import argparse
from typing import Literal, get_args

from tinsmith.store.projects import ProjectRole, ProjectRow

from .office import Actions, Office, add_action, add_yes, needs_yes, shown_time


def add_parser(commands: Actions) -> None:
    parser = commands.add_parser("project", help="make, list and end projects, and say who works in them")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = add_action(actions, "create", _create, "make a project")
    create.add_argument("name")
    create.add_argument(
        "--everyone",
        choices=get_args(ProjectRole),
        help="what every member of the organization may do there (default: nothing)",
    )
    add_action(actions, "list", _list, "list an organization's projects")
    show = add_action(actions, "show", _show, "who may do what in a project")
    show.add_argument("project", help="name or id")
    rename = add_action(actions, "rename", _rename, "give a project another name")
    rename.add_argument("project", help="name or id")
    rename.add_argument("new_name", metavar="NEW_NAME")
    grant = add_action(actions, "grant", _grant, "give a role in a project")
    grant.add_argument("project", help="name or id")
    grant.add_argument("role", choices=get_args(ProjectRole))
    revoke = add_action(actions, "revoke", _revoke, "take a role in a project")
    revoke.add_argument("project", help="name or id")
    for action in (grant, revoke):
        whom = action.add_mutually_exclusive_group(required=True)
        whom.add_argument("--user", help="e-mail address, name or id")
        whom.add_argument("--team", help="name or id")
        whom.add_argument("--everyone", action="store_true", help="every member of the organization")
    for name, run, help_ in (
        ("archive", _archive, "let nothing new be made in a project; what is there can be seen and used"),
        ("unarchive", _unarchive, "let a project be worked in again"),
        ("delete", _delete, "delete a project's checkpoints and all roles in it"),
    ):
        action = add_action(actions, name, run, help_)
        action.add_argument("project", help="name or id")
        if name == "delete":
            add_yes(action)


def _create(arguments: argparse.Namespace, office: Office) -> None:
    project = office.people.create_project(office.org(arguments.org), arguments.name, arguments.everyone)
    office.say(f"made the project {project.name} ({project.id})", _values(project))


def _list(arguments: argparse.Namespace, office: Office) -> None:
    rows = [_values(project) for project in office.people.projects(office.org(arguments.org))]
    office.table(rows, {"id": "ID", "name": "NAME", "everyone": "EVERYONE", "state": "STATE"})


def _show(arguments: argparse.Namespace, office: Office) -> None:
    org = office.org(arguments.org)
    grants = office.people.grants(org, arguments.project)
    office.sheet(
        {
            **_values(office.people.project(org, arguments.project)),
            "users": [f"{who} ({role})" for kind, who, role in grants if kind == "user"],
            "teams": [f"{who} ({role})" for kind, who, role in grants if kind == "team"],
        }
    )


def _rename(arguments: argparse.Namespace, office: Office) -> None:
    project = office.people.rename_project(office.org(arguments.org), arguments.project, arguments.new_name)
    office.say(f"{arguments.project} is called {project.name} now", _values(project))


def _grant(arguments: argparse.Namespace, office: Office) -> None:
    kind, who = _whom(arguments)
    project = office.people.grant(office.org(arguments.org), arguments.project, kind, who, arguments.role)
    shown = "everyone" if kind == "everyone" else who
    office.say(f"{shown} is {arguments.role} in {project.name}", _values(project))


def _revoke(arguments: argparse.Namespace, office: Office) -> None:
    kind, who = _whom(arguments)
    project = office.people.grant(office.org(arguments.org), arguments.project, kind, who, None)
    shown = "everyone" if kind == "everyone" else who
    office.say(f"{shown} has no role of its own in {project.name} any more", _values(project))


def _whom(arguments: argparse.Namespace) -> tuple[Literal["user", "team", "everyone"], str]:
    if arguments.everyone:
        return "everyone", ""
    return ("user", arguments.user) if arguments.user is not None else ("team", arguments.team)


def _archive(arguments: argparse.Namespace, office: Office) -> None:
    project = office.people.archive_project(office.org(arguments.org), arguments.project, True)
    office.say(f"{project.name} is archived", _values(project))


def _unarchive(arguments: argparse.Namespace, office: Office) -> None:
    project = office.people.archive_project(office.org(arguments.org), arguments.project, False)
    office.say(f"{project.name} can be worked in again", _values(project))


def _delete(arguments: argparse.Namespace, office: Office) -> None:
    org = office.org(arguments.org)
    project = office.people.project(org, arguments.project)
    needs_yes(arguments, f"deleting {project.name} deletes its checkpoints")
    office.people.delete_project(org, project.id)
    office.say(f"deleted {project.name}; a running server sweeps its checkpoints soon", _values(project))


def _values(project: ProjectRow) -> dict[str, object]:
    state = "archived" if project.archived_at is not None else "default" if project.is_default else "open"
    return {
        "id": project.id,
        "name": project.name,
        "created_at": shown_time(project.created_at),
        "everyone": project.org_role,
        "state": state,
    }
