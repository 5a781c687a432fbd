"""Usage by the hour, the lives of checkpoints, limits"""

import time

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("pk", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("org_id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=1024), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("rate", sa.String(length=32), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_usage_org_id")),
        sa.PrimaryKeyConstraint("pk", name=op.f("pk_usage")),
        sa.UniqueConstraint(
            "org_id", "hour", "session_id", "kind", "model", "rate", "key_id", "user_id", "project_id",
            name="uq_usage",
        ),
    )  # fmt: skip
    op.create_index(op.f("ix_usage_hour"), "usage", ["hour"])
    op.create_table(
        "storage_spans",
        sa.Column("checkpoint_id", sa.String(length=64), nullable=False),
        sa.Column("org_id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=1024), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("begin_at", sa.Float(), nullable=False),
        sa.Column("end_at", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_storage_spans_org_id")),
        sa.PrimaryKeyConstraint("checkpoint_id", name=op.f("pk_storage_spans")),
    )
    op.create_index(op.f("ix_storage_spans_end_at"), "storage_spans", ["end_at"])
    op.create_table(
        "meters",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_meters")),
    )
    op.create_table(
        "limits",
        sa.Column("org_id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("value", sa.String(length=32), nullable=False),
        sa.Column("set_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("org_id", "project_id", "name", name=op.f("pk_limits")),
    )
    op.add_column("commands", sa.Column("key_id", sa.String(length=64), nullable=True))
    # What is stored already is counted from now on.
    op.get_bind().execute(
        sa.text(
            "insert into storage_spans (checkpoint_id, org_id, project_id, session_id, user_id, key_id,"
            " model, size_bytes, begin_at) select checkpoints.id, checkpoints.org_id, runs.project_id,"
            " runs.session_id, runs.user_id, sessions.key_id, runs.base_model,"
            " coalesce(checkpoints.size_bytes, 0), :now"
            " from checkpoints join runs on runs.id = checkpoints.run_id"
            " join sessions on sessions.id = runs.session_id"
        ),
        {"now": time.time()},
    )


def downgrade() -> None:
    op.drop_column("commands", "key_id")
    for table in ("limits", "meters", "storage_spans", "usage"):
        op.drop_table(table)
