"""Events of the federation itself, which belong to no run."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Let an event be of no run."""
    with op.batch_alter_table("events") as table:
        table.alter_column("run", existing_type=sa.String(96), nullable=True)
