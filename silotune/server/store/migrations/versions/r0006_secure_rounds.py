"""What a secure round has settled."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "secure_rounds",
        sa.Column("run", sa.String(96), sa.ForeignKey("runs.run"), primary_key=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
    )
