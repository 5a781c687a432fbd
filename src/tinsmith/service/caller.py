"""Who is calling, and what it may do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tinsmith.store.people import Role
from tinsmith.store.scope import Owned, Scope

from .access import OrgRight, Right, left_by
from .errors import Forbidden
from .limits import Who


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is, and what it may do."""

    key_id: str
    org_id: str
    org_name: str
    user_id: str
    user_name: str
    user_email: str | None
    role: Role
    scopes: frozenset[str] | None  # None: whatever the user may do
    project_id: str | None  # the one project that the key is good for; None: all of the user's
    admin: bool  # an operator of this server
    home: str  # the project of what names none
    rights: Mapping[str, frozenset[str]]  # by project
    elsewhere: frozenset[str]  # in projects that are not in `rights`
    org_rights: frozenset[str]

    @property
    def who(self) -> Who:
        """Whose call this is, where it belongs to no session."""
        return Who(self.org_id, self.home, "", self.user_id, self.key_id)

    def may(self, project_id: str, right: Right) -> bool:
        return right in self.rights.get(project_id, self.elsewhere)

    def scope(self, right: Right = "see") -> Scope:
        """Where the caller has a right. Who may only sample in a project sees there what is its own."""
        if right in self.elsewhere:
            return Scope(self.org_id, self.user_id, None)
        having = frozenset(id_ for id_, rights in self.rights.items() if right in rights)
        own = frozenset(id_ for id_, rights in self.rights.items() if "sample" in rights) - having
        return Scope(self.org_id, self.user_id, having, own if right == "see" else frozenset())

    def require(self, project_id: str, right: Right) -> None:
        """Raises Forbidden where the caller may not do this in a project that it knows of."""
        if not self.may(project_id, right):
            raise Forbidden(f"this needs {_NEEDED[right]} in the project {project_id}; {self._why()}")

    def require_over(self, row: Owned) -> None:
        """Raises Forbidden unless the caller may end or steer somebody's work: its user's own, whatever has
        become of its role since, or anybody's where it may work."""
        if row.user_id != self.user_id or "sample" not in left_by(self.scopes):
            self.require(row.project_id, "work")

    def require_org(self, right: OrgRight) -> None:
        if right not in self.org_rights:
            raise Forbidden(f"this needs {_NEEDED_OF_ORG[right]}; {self._why()}")

    def _why(self) -> str:
        whose = f"this key belongs to {self.user_email or self.user_name}, {self.role} of {self.org_name}"
        if self.scopes is not None:
            whose += f", and is limited to {', '.join(sorted(self.scopes)) or 'nothing'}"
        return whose


_NEEDED: dict[Right, str] = {
    "see": "the role viewer",
    "sample": "the role sampler",
    "work": "the role member",
    "manage": "the role admin",
}
_NEEDED_OF_ORG: dict[OrgRight, str] = {
    "billing": "the organization's role billing-admin or admin",
    "audit": "the organization's role admin",
    "manage": "the organization's role admin",
}
