"""What an operator does about organizations, users, teams and projects. Each act and its entry in the
audit log are one transaction; they work on a data folder whether or not a server runs on it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

from tinsmith.store import Connection, audit, orgs, people, projects, teams
from tinsmith.store.audit import AuditRow, EventType
from tinsmith.store.orgs import OrgRow
from tinsmith.store.people import Role, UserRow
from tinsmith.store.projects import ProjectRole, ProjectRow
from tinsmith.store.teams import TeamRow

from .acts import Acts
from .audit import record
from .named import AdminError, check_name, the_org, the_project, the_team, the_user


class Administration(Acts):
    def _note(
        self,
        connection: Connection,
        org_id: str,
        resource: str,
        act: str,
        about: Mapping[str, object],
        how: Mapping[str, object] | None = None,
    ) -> None:
        record(connection, self._actor, org_id, resource, act, about, how)

    # Organizations

    def orgs(self) -> list[OrgRow]:
        return self._do(orgs.every)

    def org(self, wanted: str) -> OrgRow:
        return self._do(lambda connection: the_org(connection, wanted))

    def create_org(self, name: str) -> OrgRow:
        def work(connection: Connection) -> OrgRow:
            check_name(name)
            if orgs.find(connection, name) is not None:
                raise AdminError(f"there is an organization called {name!r} already")
            org = orgs.add(connection, name, time.time())
            self._note(connection, org.id, "organization", "create", {"organization_name": name})
            return org

        return self._do(work)

    def rename_org(self, wanted: str, name: str) -> OrgRow:
        def work(connection: Connection) -> OrgRow:
            org = the_org(connection, wanted)
            check_name(name)
            if orgs.find(connection, name) is not None:
                raise AdminError(f"there is an organization called {name!r} already")
            orgs.rename(connection, org, name)
            self._note(
                connection, org.id, "organization", "rename", {"organization_name": org.name}, {"name": name}
            )
            return the_org(connection, org.id)

        return self._do(work)

    def disable_org(self, wanted: str, disabled: bool) -> OrgRow:
        """None of its keys is valid until it is enabled again."""

        def work(connection: Connection) -> OrgRow:
            org = the_org(connection, wanted)
            orgs.set_disabled(connection, org, time.time() if disabled else None)
            act = "disable" if disabled else "enable"
            self._note(connection, org.id, "organization", act, {"organization_name": org.name})
            return the_org(connection, org.id)

        return self._do(work)

    def delete_org(self, wanted: str) -> OrgRow:
        def work(connection: Connection) -> OrgRow:
            org = the_org(connection, wanted)
            orgs.delete(connection, org, time.time())
            self._note(connection, org.id, "organization", "delete", {"organization_name": org.name})
            return org

        return self._do(work)

    # Users

    def users(self, org: str) -> list[UserRow]:
        return self._do(lambda connection: people.members(connection, the_org(connection, org).id))

    def user(self, org: str, user: str) -> UserRow:
        return self._do(lambda connection: the_user(connection, org, user))

    def roles_of(self, user: UserRow) -> list[tuple[ProjectRow, set[ProjectRole]]]:
        """A user's roles in its organization's projects: administrators have them all."""

        def work(connection: Connection) -> list[tuple[ProjectRow, set[ProjectRole]]]:
            found = projects.roles_of(connection, user.org_id, user.id)
            return [(row, {"admin"} if user.role == "admin" else roles) for row, roles in found]

        return self._do(work)

    def create_user(self, org: str, name: str, email: str | None, role: Role) -> UserRow:
        def work(connection: Connection) -> UserRow:
            org_id = the_org(connection, org).id
            check_name(name)
            user = people.add(connection, org_id, name, email, role, time.time())
            if user is None:
                raise AdminError(f"{email} is a member of {org} already")
            self._note(connection, org_id, "user", "create", _about_user(user), {"role": role})
            return user

        return self._do(work)

    def set_role(self, org: str, user: str, role: Role) -> UserRow:
        def work(connection: Connection) -> UserRow:
            row = the_user(connection, org, user)
            people.set_role(connection, row, role)
            how = {"role": role, "before": row.role}
            self._note(connection, row.org_id, "user", "role_set", _about_user(row), how)
            return the_user(connection, row.org_id, row.id)

        return self._do(work)

    def disable_user(self, org: str, user: str, disabled: bool) -> UserRow:
        """In all of its organizations none of its keys is valid until it is enabled again."""

        def work(connection: Connection) -> UserRow:
            row = the_user(connection, org, user)
            people.set_disabled(connection, row, time.time() if disabled else None)
            act = "disable" if disabled else "enable"
            for org_id in people.orgs_of(connection, row.id):
                self._note(connection, org_id, "user", act, _about_user(row))
            return the_user(connection, row.org_id, row.id)

        return self._do(work)

    def remove_user(self, org: str, user: str) -> UserRow:
        def work(connection: Connection) -> UserRow:
            row = the_user(connection, org, user)
            people.remove(connection, row, time.time())
            self._note(connection, row.org_id, "user", "delete", _about_user(row))
            return row

        return self._do(work)

    # Teams

    def teams(self, org: str) -> list[tuple[TeamRow, list[UserRow]]]:
        def work(connection: Connection) -> list[tuple[TeamRow, list[UserRow]]]:
            org_id = the_org(connection, org).id
            users = {user.id: user for user in people.members(connection, org_id)}
            return [
                (team, [users[id_] for id_ in teams.members(connection, team) if id_ in users])
                for team in teams.of_org(connection, org_id)
            ]

        return self._do(work)

    def create_team(self, org: str, name: str) -> TeamRow:
        def work(connection: Connection) -> TeamRow:
            org_id = the_org(connection, org).id
            check_name(name)
            if teams.find(connection, org_id, name) is not None:
                raise AdminError(f"{org} has a team called {name!r} already")
            team = teams.add(connection, org_id, name, time.time())
            self._note(connection, org_id, "team", "create", {"team_id": team.id, "team_name": name})
            return team

        return self._do(work)

    def change_team(self, org: str, team: str, user: str, member: bool) -> TeamRow:
        """Add a user to a team, or take it out."""

        def work(connection: Connection) -> TeamRow:
            row = the_team(connection, org, team)
            who = the_user(connection, row.org_id, user)
            changed = (teams.join if member else teams.leave)(connection, row, who.id)
            if not changed:
                raise AdminError(f"{who.shown} is {'already' if member else 'not'} in the team {row.name}")
            act = "member_add" if member else "member_remove"
            about = {"team_id": row.id, "team_name": row.name}
            self._note(connection, row.org_id, "team", act, about, _about_user(who))
            return row

        return self._do(work)

    def delete_team(self, org: str, team: str) -> TeamRow:
        def work(connection: Connection) -> TeamRow:
            row = the_team(connection, org, team)
            teams.delete(connection, row)
            self._note(connection, row.org_id, "team", "delete", {"team_id": row.id, "team_name": row.name})
            return row

        return self._do(work)

    # Projects

    def projects(self, org: str) -> list[ProjectRow]:
        return self._do(lambda connection: projects.of_org(connection, the_org(connection, org).id))

    def project(self, org: str, project: str) -> ProjectRow:
        return self._do(lambda connection: the_project(connection, org, project))

    def grants(self, org: str, project: str) -> list[tuple[str, str, ProjectRole]]:
        """Who has a role in a project: "user" or "team", its name, and the role."""

        def work(connection: Connection) -> list[tuple[str, str, ProjectRole]]:
            row = the_project(connection, org, project)
            names = {user.id: user.shown for user in people.members(connection, row.org_id)}
            names |= {team.id: team.name for team in teams.of_org(connection, row.org_id)}
            return [(kind, names.get(id_, id_), role) for kind, id_, role in projects.grants(connection, row)]

        return self._do(work)

    def create_project(self, org: str, name: str, org_role: ProjectRole | None) -> ProjectRow:
        def work(connection: Connection) -> ProjectRow:
            org_id = the_org(connection, org).id
            check_name(name)
            if projects.find(connection, org_id, name) is not None:
                raise AdminError(f"{org} has a project called {name!r} already")
            row = projects.add(connection, org_id, name, time.time(), org_role=org_role)
            self._note(connection, org_id, "project", "create", _about(row), {"everyone": org_role})
            return row

        return self._do(work)

    def rename_project(self, org: str, project: str, name: str) -> ProjectRow:
        def work(connection: Connection) -> ProjectRow:
            row = the_project(connection, org, project)
            check_name(name)
            if projects.find(connection, row.org_id, name) is not None:
                raise AdminError(f"{org} has a project called {name!r} already")
            projects.rename(connection, row, name)
            self._note(connection, row.org_id, "project", "rename", _about(row), {"name": name})
            return the_project(connection, row.org_id, row.id)

        return self._do(work)

    def archive_project(self, org: str, project: str, archived: bool) -> ProjectRow:
        """Nothing new is made in an archived project; what is in it can be seen and used elsewhere."""

        def work(connection: Connection) -> ProjectRow:
            row = the_project(connection, org, project)
            if row.is_default and archived:
                raise AdminError("the default project cannot be archived: sessions that name none go there")
            projects.set_archived(connection, row, time.time() if archived else None)
            act = "archive" if archived else "unarchive"
            self._note(connection, row.org_id, "project", act, _about(row))
            return the_project(connection, row.org_id, row.id)

        return self._do(work)

    def delete_project(self, org: str, project: str) -> ProjectRow:
        def work(connection: Connection) -> ProjectRow:
            row = the_project(connection, org, project)
            if row.is_default:
                raise AdminError("the default project cannot be deleted: sessions that name none go there")
            projects.delete(connection, row, time.time())
            self._note(connection, row.org_id, "project", "delete", _about(row))
            return row

        return self._do(work)

    def grant(
        self,
        org: str,
        project: str,
        kind: Literal["user", "team", "everyone"],
        who: str,
        role: ProjectRole | None,
    ) -> ProjectRow:
        """Give a user, a team or every member a role in a project, or with None take it."""

        def work(connection: Connection) -> ProjectRow:
            row = the_project(connection, org, project)
            if kind == "everyone":
                projects.set_org_role(connection, row, role)
                principal: dict[str, object] = {"principal_type": "organization", "principal_id": row.org_id}
            else:
                if kind == "user":
                    found: UserRow | TeamRow = the_user(connection, row.org_id, who)
                else:
                    found = the_team(connection, row.org_id, who)
                changed = projects.set_grant(connection, row, kind, found.id, role, time.time())
                if not changed and role is None:
                    raise AdminError(f"{who} has no role in the project {row.name}")
                principal = {"principal_type": kind, "principal_id": found.id}
            act = "grant_set" if role is not None else "grant_remove"
            how = {**principal, "project_role": f"project_{role}" if role is not None else None}
            self._note(connection, row.org_id, "project", act, _about(row), how)
            return the_project(connection, row.org_id, row.id)

        return self._do(work)

    # The audit log

    def audit(
        self, org: str, since: float, until: float, event_type: EventType | None = None
    ) -> list[AuditRow]:
        return self._do(
            lambda connection: audit.page(connection, the_org(connection, org).id, since, until, event_type)[
                0
            ]
        )


def _about_user(user: UserRow) -> dict[str, object]:
    return {"user_id": user.id, "user_name": user.name, "user_email": user.email}


def _about(project: ProjectRow) -> dict[str, object]:
    return {"project_id": project.id, "project_name": project.name}
