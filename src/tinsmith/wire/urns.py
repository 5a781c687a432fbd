"""How Tinker names users and organizations in answers."""

from __future__ import annotations


def user_urn(user_id: str) -> str:
    """A member of an organization."""
    return f"tml:organization_user:{user_id}"


def org_urn(org_id: str) -> str:
    return f"tml:organization:{org_id}"
