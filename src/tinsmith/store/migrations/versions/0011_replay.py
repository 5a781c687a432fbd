"""What a replay of a run's log needs to know"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("runs", sa.Column("turn_seq", sa.BigInteger(), nullable=True))
    op.add_column("runs", sa.Column("lost", sa.Text(), nullable=True))
    op.add_column("commands", sa.Column("loaded", sa.String(length=64), nullable=True))
    op.add_column("commands", sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("sampling_sessions", sa.Column("run_id", sa.String(length=128), nullable=True))
    op.add_column("sampling_sessions", sa.Column("seq_id", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    for table, names in (
        ("sampling_sessions", ("seq_id", "run_id")),
        ("commands", ("attempts", "loaded")),
        ("runs", ("lost", "turn_seq")),
    ):
        for name in names:
            op.drop_column(table, name)
