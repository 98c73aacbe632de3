"""Migrations of the coordinator's store (Alembic), oldest first in ``versions``."""
