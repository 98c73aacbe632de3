"""What the coordinator remembers of the sites' books."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "site_books",
        sa.Column("site", sa.String(63), primary_key=True),
        sa.Column("known", sa.Text, nullable=False),
        sa.Column("spent", sa.Text, nullable=False),
        sa.Column("halted", sa.Text, nullable=False),
        sa.Column("time", sa.Float, nullable=False),
    )
