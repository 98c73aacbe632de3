"""The coordinator's durable store: one database, SQLite by default, PostgreSQL by URL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from silotune.federation.sealed import Vault
from silotune.server.errors import StoreUnusable

MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_MILLISECONDS = 30_000


class Store:
    """The database, migrated to this version's tables.

    Parameters
    ----------
    url : str
        SQLAlchemy's form: ``sqlite:////var/lib/silotune/coordinator.sqlite`` or
        ``postgresql+psycopg://user@host/name``.
    vault : Vault
        Seals adapters and checkpoints before they are written.

    Raises
    ------
    StoreUnusable
        Not reachable, not writable, or of a newer version.
    """

    def __init__(self, url: str, *, vault: Vault) -> None:
        self.vault = vault
        try:
            parsed = make_url(url)
            if parsed.get_backend_name() == "sqlite" and parsed.database:
                os.close(os.open(parsed.database, os.O_CREAT | os.O_RDWR, 0o600))
            self._engine = create_engine(parsed)
            if parsed.get_backend_name() == "sqlite":
                event.listen(self._engine, "connect", _make_durable)
            with self._engine.begin() as connection:
                migrate(connection)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, OSError) as exc:
            raise StoreUnusable(f"the store can't be opened: {exc}") from exc
        except (DBAPIError, CommandError) as exc:
            raise StoreUnusable(f"the store can't be opened ({type(exc).__name__})") from exc

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction: committed, to the disk, on leaving; rolled back by an exception."""
        with self._engine.begin() as connection:
            yield connection

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()


def migrate(connection: Connection, *, to: str = "head") -> None:
    """Bring the tables to a version, by default this one's; nothing happens if they are."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def _make_durable(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        "secure_delete = ON",
        f"busy_timeout = {_BUSY_MILLISECONDS}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
