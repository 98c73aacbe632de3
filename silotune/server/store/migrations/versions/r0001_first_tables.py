"""First tables: sites, rosters, runs and what happened in them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create every table."""
    _sites()
    _runs()
    _parts_of_runs()


def _sites() -> None:
    op.create_table(
        "invites",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("site", sa.String(63), nullable=False),
        sa.Column("expires", sa.BigInteger, nullable=False),
        sa.Column("rotates", sa.Integer, nullable=False),
        sa.Column("used_at", sa.Float),
    )
    op.create_table(
        "enrolments",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("site", sa.String(63), nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("signing_key", sa.String(44), nullable=False),
        sa.Column("node_key", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("requested_at", sa.Float, nullable=False),
        sa.Column("decided_at", sa.Float),
    )
    op.create_table(
        "members",
        sa.Column("site", sa.String(63), primary_key=True),
        sa.Column("signing_key", sa.String(44), nullable=False),
        sa.Column("node_key", sa.Text, nullable=False),
        sa.Column("certificate", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("since", sa.Float, nullable=False),
    )
    op.create_table(
        "rosters",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("roster", sa.Text, nullable=False),
        sa.Column("signature", sa.String(88), nullable=False),
    )


def _runs() -> None:
    op.create_table(
        "runs",
        sa.Column("run", sa.String(96), primary_key=True),
        sa.Column("plan", sa.Text, nullable=False),
        sa.Column("plan_sha256", sa.String(64), nullable=False),
        sa.Column("plan_name", sa.String(63), nullable=False),
        sa.Column("rounds", sa.Integer, nullable=False),
        sa.Column("quorum", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("link_run", sa.String(20)),
        sa.Column("code", sa.String(6)),
        sa.Column("detail", sa.Text),
        sa.Column("proposed_at", sa.Float, nullable=False),
        sa.Column("started_at", sa.Float),
        sa.Column("finished_at", sa.Float),
    )


def _parts_of_runs() -> None:
    run = sa.String(96)
    op.create_table(
        "decisions",
        sa.Column("run", run, sa.ForeignKey("runs.run"), primary_key=True),
        sa.Column("site", sa.String(63), primary_key=True),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("decided_at", sa.Float, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "events",
        sa.Column("id", serial, primary_key=True, autoincrement=True),
        sa.Column("run", run, sa.ForeignKey("runs.run"), nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("event", sa.String(40), nullable=False),
        sa.Column("fields", sa.Text, nullable=False),
    )
    op.create_index("events_by_run", "events", ["run", "id"])
    op.create_table(
        "adapters",
        sa.Column("run", run, sa.ForeignKey("runs.run"), primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("content", sa.LargeBinary),
    )
    op.create_table(
        "checkpoints",
        sa.Column("run", run, sa.ForeignKey("runs.run"), primary_key=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
    )
