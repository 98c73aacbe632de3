"""Coordinators that open fast: Flower's migrations of an empty link state are run once, and copied."""

import functools
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

from flwr.supercore import sql_mixin

from silotune.flower.superlink import flower_state
from silotune.server.coordinator import Coordinator


@functools.cache
def _migrated():
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "link.sqlite"
        flower_state(database)
        with closing(sqlite3.connect(database)) as connection:
            return connection.serialize()


def open_coordinator(home):
    """The coordinator of a folder, not started. tests/flower and tests/e2e see the migrations run."""
    content = _migrated()
    if not home.link_database.exists():
        home.link_database.touch(mode=0o600)
        home.link_database.write_bytes(content)
    with patch.object(sql_mixin, "run_migrations", lambda engine: None):
        return Coordinator(home)
