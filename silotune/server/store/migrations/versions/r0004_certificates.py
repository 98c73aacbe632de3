"""Privacy certificates of sites."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "certificates",
        sa.Column("run", sa.String(96), sa.ForeignKey("runs.run"), primary_key=True),
        sa.Column("site", sa.String(63), primary_key=True),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("content", sa.Text, nullable=False),
    )
