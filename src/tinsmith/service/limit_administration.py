"""What an operator does about limits. Each change and its entry in the audit log are one transaction."""

from __future__ import annotations

import time
from dataclasses import dataclass
from decimal import Decimal

from tinsmith.store import Connection, ledger, limits, orgs, projects
from tinsmith.store.limits import LimitRow
from tinsmith.store.scope import SERVER, Scope

from .acts import Acts
from .audit import record
from .limits import ABOUT, DEFAULT, read_value
from .metering import month_of, spent_by_place
from .named import AdminError, the_org, the_project
from .prices import GIGABYTE, plain


@dataclass(frozen=True, slots=True)
class Shown:
    """A limit that holds: of an organization, or of one of its projects. `used` where the data folder says
    it; what is at work at this moment only the server knows."""

    name: str
    project: str | None
    value: Decimal
    default: bool  # set for all organizations, and not for this one
    used: Decimal | None


class LimitAdministration(Acts):
    def set(self, org: str | None, project: str | None, name: str, value: str | None) -> LimitRow | None:
        """Set a limit, or with no `value` take it away. `org` None: for all that have none of their own.
        Answers what holds then at this very place. Raises AdminError."""
        try:
            amount = read_value(name, value if value is not None else "1")
        except ValueError as error:
            raise AdminError(str(error)) from None
        if name == "weight" and project is not None:
            raise AdminError("weight: is an organization's, not a project's")

        def work(connection: Connection) -> LimitRow | None:
            org_id, project_id = _place(connection, org, project)
            row = LimitRow(org_id, project_id, name, amount, time.time())
            if value is not None:
                limits.put(connection, row)
            elif not limits.drop(connection, org_id, project_id, name):
                raise AdminError(f"{name} is not set there; see: tinsmith limits show")
            about: dict[str, object] = {"limit": name}
            if project_id:
                about["project_id"] = project_id
            how = {"value": plain(amount) if value is not None else None}
            act = "set_limit" if value is not None else "unset_limit"
            concerned = [org_id] if org_id else [each.id for each in orgs.every(connection)]
            for each in concerned:
                record(connection, self._actor, each, "organization", act, about, how)
            return row if value is not None else None

        return self._do(work)

    def defaults(self) -> list[LimitRow]:
        return [row for row in self._do(_every) if row.org_id == DEFAULT]

    def show(self, org: str) -> list[Shown]:
        """All limits that hold for an organization and in its projects. Raises AdminError."""

        def work(connection: Connection) -> list[Shown]:
            org_id = the_org(connection, org).id
            scope = Scope(org_id, "", None)
            now = time.time()
            spent = spent_by_place(connection, scope, month_of(now))
            stored = ledger.stored(connection, scope, now)
            names = {row.id: row.name for row in projects.of_org(connection, org_id)}

            def used(name: str, project_id: str) -> Decimal | None:
                if name == "monthly_spend_usd":
                    return spent.get((org_id, project_id), Decimal(0))
                if name == "storage_gb":
                    whole = stored.get(project_id, 0) if project_id else sum(stored.values())
                    return Decimal(whole) / GIGABYTE
                return None

            own = {
                (row.project_id, row.name): row.value for row in _every(connection) if row.org_id == org_id
            }
            common = {row.name: row.value for row in _every(connection) if row.org_id == DEFAULT}
            found = []
            for name in ABOUT:
                if ("", name) in own or name in common:
                    value = own.get(("", name), common.get(name, Decimal(0)))
                    found.append(Shown(name, None, value, ("", name) not in own, used(name, "")))
                found += [
                    Shown(name, names.get(project_id, project_id), value, False, used(name, project_id))
                    for (project_id, each), value in sorted(own.items())
                    if each == name and project_id
                ]
            return found

        return self._do(work)


def _every(connection: Connection) -> list[LimitRow]:
    return limits.every(connection, SERVER)


def _place(connection: Connection, org: str | None, project: str | None) -> tuple[str, str]:
    if org is None:
        if project is not None:
            raise AdminError("a default holds for organizations; --project goes with --org")
        return DEFAULT, ""
    return the_org(connection, org).id, the_project(
        connection, org, project
    ).id if project is not None else ""
