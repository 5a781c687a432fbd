"""Searching for sessions, and what failed in them"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("sessions", sa.Column("search_name", sa.Text(), nullable=True))
    op.add_column("sessions", sa.Column("failure", sa.Text(), nullable=True))
    op.add_column("sessions", sa.Column("lost", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "session_metadata",
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("org_id", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_session_metadata_org_id")),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name=op.f("fk_session_metadata_session_id")),
        sa.PrimaryKeyConstraint("session_id", "key", name=op.f("pk_session_metadata")),
    )
    _fill(op.get_bind())


def _fill(connection: sa.Connection) -> None:
    """Make the sessions that are there findable."""
    rows = connection.execute(sa.text("select id, org_id, display_name, user_metadata from sessions"))
    for session_id, org_id, name, metadata in rows.all():
        if name is not None:
            connection.execute(
                sa.text("update sessions set search_name = :name where id = :id"),
                {"name": name.casefold(), "id": session_id},
            )
        for key, value in (json.loads(metadata) if metadata else {}).items():
            connection.execute(
                sa.text(
                    "insert into session_metadata (session_id, org_id, key, value)"
                    " values (:session, :org, :key, :value)"
                ),
                {
                    "session": session_id,
                    "org": org_id,
                    "key": key,
                    "value": value if isinstance(value, str) else str(value),
                },
            )


def downgrade() -> None:
    op.drop_table("session_metadata")
    for column in ("lost", "failure", "search_name"):
        op.drop_column("sessions", column)
