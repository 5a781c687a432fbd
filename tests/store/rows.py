"""Rows that others need."""

from __future__ import annotations

import sqlalchemy as sa

from tinsmith.store import keys, orgs, people
from tinsmith.store.keys import KeyRow


def make_key(connection: sa.Connection, org: str) -> KeyRow:
    """A key of the one user of a new organization."""
    owner = orgs.add(connection, org, 1.0)
    user = people.add(connection, owner.id, "k", None, "admin", 1.0)
    assert user is not None
    return keys.add(connection, org_id=owner.id, user_id=user.id, name="k", prefix="tml-", hash_=org, now=1.0)
