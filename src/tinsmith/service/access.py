"""Who may do what: the roles, and what a key can be narrowed to.

A user's role in a project says what it may do there; an organization's administrators may do
everything in all of its projects. A key does what its user may do, or, with scopes, less.
"""

from __future__ import annotations

from typing import Literal

from tinsmith.store.people import Role
from tinsmith.store.projects import ProjectRole

# see: find and list what is in a project, and use its weights elsewhere. sample: open sessions there and
# sample from its weights. work: train, save, publish, delete. manage: say who may do what.
Right = Literal["see", "sample", "work", "manage"]
# What concerns the organization as a whole.
OrgRight = Literal["billing", "audit", "manage"]

PROJECT_RIGHTS: dict[ProjectRole, frozenset[Right]] = {
    "admin": frozenset({"see", "sample", "work", "manage"}),
    "member": frozenset({"see", "sample", "work"}),
    "sampler": frozenset({"sample"}),
    "viewer": frozenset({"see"}),
}

ORG_RIGHTS: dict[Role, frozenset[OrgRight]] = {
    "admin": frozenset({"billing", "audit", "manage"}),
    "billing-admin": frozenset({"billing"}),
    "member": frozenset(),
}

# What a key's scopes leave of its user's rights.
SCOPES: dict[str, frozenset[str]] = {
    "read": frozenset({"see"}),
    "sample": frozenset({"sample"}),
    "train": frozenset({"see", "sample", "work"}),
    "billing": frozenset({"billing"}),
    "audit": frozenset({"audit"}),
    "admin": frozenset({"see", "sample", "work", "manage", "billing", "audit"}),
}


def left_by(scopes: frozenset[str] | None) -> frozenset[str]:
    """The rights that a key with `scopes` can use at all."""
    if scopes is None:
        return SCOPES["admin"]
    return frozenset().union(*(SCOPES.get(scope, frozenset()) for scope in scopes))
