"""What clients tell of themselves"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "telemetry",
        sa.Column("pk", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("org_id", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("session_id", sa.String(length=128), nullable=False),
        sa.Column("process", sa.String(length=64), nullable=True),
        sa.Column("sdk_version", sa.String(length=64), nullable=False),
        sa.Column("platform", sa.String(length=64), nullable=False),
        sa.Column("received_at", sa.Float(), nullable=False),
        sa.Column("event_id", sa.String(length=64), nullable=False),
        sa.Column("place", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=256), nullable=True),
        sa.Column("severity", sa.String(length=16), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_telemetry_org_id")),
        sa.PrimaryKeyConstraint("pk", name=op.f("pk_telemetry")),
        sa.UniqueConstraint(
            "org_id", "session_id", "event_id", name=op.f("uq_telemetry_org_id_session_id_event_id")
        ),
    )
    op.create_index(op.f("ix_telemetry_org_id_pk"), "telemetry", ["org_id", "pk"])
    op.create_index(op.f("ix_telemetry_received_at"), "telemetry", ["received_at"])


def downgrade() -> None:
    op.drop_table("telemetry")
