"""When requests came, ran and were fetched"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "trace_chunks",
        sa.Column("pk", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("org_id", sa.String(length=64), nullable=False),
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("written_at", sa.Float(), nullable=False),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_trace_chunks_org_id")),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name=op.f("fk_trace_chunks_session_id")),
        sa.PrimaryKeyConstraint("pk", name=op.f("pk_trace_chunks")),
    )
    op.create_index(op.f("ix_trace_chunks_session_id"), "trace_chunks", ["session_id"])
    op.create_index(op.f("ix_trace_chunks_written_at"), "trace_chunks", ["written_at"])


def downgrade() -> None:
    op.drop_table("trace_chunks")
