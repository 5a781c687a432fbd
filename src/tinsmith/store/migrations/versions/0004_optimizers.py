"""A run has one of several optimizers"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("runs", sa.Column("optimizer", sa.String(16), nullable=False, server_default="adamw"))


def downgrade() -> None:
    op.drop_column("runs", "optimizer")
