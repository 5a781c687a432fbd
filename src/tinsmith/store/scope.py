"""What somebody may come by: the one place where queries are held within an organization.

Whoever asks the store for rows says within which scope, and every statement on a table of tenants'
rows takes its condition from `Scope.rows`; a test reads the statements of this package to see that it
does. A row outside the scope is not found, exactly as one that does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import sqlalchemy as sa

from .tables import runs, sessions


class Owned(Protocol):
    """A row that belongs to a user's work in a project."""

    @property
    def org_id(self) -> str: ...
    @property
    def project_id(self) -> str: ...
    @property
    def user_id(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose something is that has no row."""

    org_id: str
    project_id: str
    user_id: str


@dataclass(frozen=True, slots=True)
class Scope:
    """The rows of `org_id` that lie in one of `projects`, or in one of `own` and are the user's. None
    stands for all of the organization's projects."""

    org_id: str
    user_id: str
    projects: frozenset[str] | None
    own: frozenset[str] | None = frozenset()

    def mine(self) -> Scope:
        """Of these, what is the user's own."""
        everywhere = self.projects is None or self.own is None
        own = None if everywhere else (self.projects or frozenset()) | (self.own or frozenset())
        return replace(self, projects=frozenset(), own=own)

    def within(self, project_id: str) -> Scope:
        """Of these, what lies in one project."""
        one = frozenset({project_id})
        return replace(
            self,
            projects=one if self.projects is None else self.projects & one,
            own=one if self.own is None else self.own & one,
        )

    def sees(self, row: Owned) -> bool:
        """As `rows`, for a row that is at hand."""
        if row.org_id != self.org_id:
            return False
        if self.projects is None or row.project_id in self.projects:
            return True
        return row.user_id == self.user_id and (self.own is None or row.project_id in self.own)

    def rows(self, table: sa.FromClause) -> sa.ColumnElement[bool]:
        """The condition that holds a statement on `table` within the scope."""
        mine: sa.ColumnElement[bool] = table.c.org_id == self.org_id
        if self.projects is None:
            return mine
        if "project_id" in table.c:
            return mine & self._projects(table)
        parent = (runs if "run_id" in table.c else sessions).alias()
        key = table.c.run_id if "run_id" in table.c else table.c.session_id
        return mine & sa.exists().where(parent.c.id == key, self._projects(parent))

    def _projects(self, table: sa.FromClause) -> sa.ColumnElement[bool]:
        assert self.projects is not None
        shared = table.c.project_id.in_(self.projects)
        if self.own is None:
            return shared | (table.c.user_id == self.user_id)
        if not self.own:
            return shared
        return shared | (table.c.project_id.in_(self.own) & (table.c.user_id == self.user_id))

    def to_json(self) -> dict[str, object]:
        """For commands that are carried out when their sender is long gone."""
        listed = {name: getattr(self, name) for name in ("projects", "own")}
        return {
            "org_id": self.org_id,
            "user_id": self.user_id,
            **{name: None if ids is None else sorted(ids) for name, ids in listed.items()},
        }

    @classmethod
    def from_json(cls, values: dict[str, object]) -> Scope:
        def ids(name: str) -> frozenset[str] | None:
            listed = values[name]
            return frozenset(str(id_) for id_ in listed) if isinstance(listed, list) else None

        return cls(str(values["org_id"]), str(values["user_id"]), ids("projects"), ids("own"))


class WholeServer(Scope):
    """Everything of everybody: for what the server does of its own accord, never for a caller."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("", "", None, None)

    def sees(self, row: Owned) -> bool:
        return True

    def rows(self, table: sa.FromClause) -> sa.ColumnElement[bool]:
        return sa.true()


SERVER = WholeServer()
