"""Alembic's entry point: runs the migrations on the connection that the store hands over."""

from alembic import context

from silotune.server.store.database import METADATA

connection = context.config.attributes["connection"]
# SQLite can't alter a table in place; "batch" copies it instead.
context.configure(connection=connection, target_metadata=METADATA, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
