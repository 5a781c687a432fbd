"""Published checkpoints"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("checkpoints", sa.Column("published_at", sa.Float(), nullable=True))


def downgrade() -> None:
    op.drop_column("checkpoints", "published_at")
