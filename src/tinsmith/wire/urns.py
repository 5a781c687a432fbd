"""How Tinker names users and organizations in answers."""

from __future__ import annotations


def user_urn(user_id: str) -> str:
    """A member of an organization."""
    return f"tml:organization_user:{user_id}"


def org_urn(org_id: str) -> str:
    return f"tml:organization:{org_id}"


def user_of_urn(urn: str) -> str | None:
    """The user that a URN names, or none where it is no user's."""
    kind, _, user_id = urn.rpartition(":")
    return user_id if kind == "tml:organization_user" and user_id else None
