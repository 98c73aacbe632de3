"""The coordinator's durable store: one database, SQLite by default, PostgreSQL by URL.

Its tables are here. Every change of them is a migration in ``migrations/``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from silotune.protocol.errors import StoreUnusable
from silotune.trust.vault import Vault

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


@contextmanager
def large_rows(connection: Connection) -> Iterator[None]:
    """Within it, SQLite holds megabytes: what does not fit is written to the disk twice."""
    if connection.dialect.name != "sqlite":
        yield
        return
    connection.exec_driver_sql("PRAGMA cache_size = -32000")
    try:
        yield
    finally:
        connection.exec_driver_sql("PRAGMA cache_size = -2000")


def migrate(connection: Connection, *, to: str = "head") -> None:
    """Bring the tables to a version, by default this one's; nothing happens if they are."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def _make_durable(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in (
        "page_size = 16384",  # of a new database: a checkpoint is megabytes in one row
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        "secure_delete = ON",
        f"busy_timeout = {_BUSY_MILLISECONDS}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


METADATA = MetaData()

_Serial = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts only INTEGER keys up

INVITES = Table(
    "invites",
    METADATA,
    Column("digest", String(64), primary_key=True),  # of the secret, which is not kept
    Column("site", String(63), nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("rotates", Integer, nullable=False),  # 1: new keys for a member
    Column("used_at", Float),
)

ENROLMENTS = Table(
    "enrolments",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("site", String(63), nullable=False),
    Column("request", Text, nullable=False),
    Column("signing_key", String(44), nullable=False),
    Column("node_key", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("requested_at", Float, nullable=False),
    Column("decided_at", Float),
)

MEMBERS = Table(
    "members",
    METADATA,
    Column("site", String(63), primary_key=True),
    Column("signing_key", String(44), nullable=False),
    Column("node_key", Text, nullable=False),
    Column("certificate", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("since", Float, nullable=False),
)

SITE_BOOKS = Table(
    "site_books",
    METADATA,
    Column("site", String(63), primary_key=True),
    Column("known", Text, nullable=False),  # the newest heads that were signed, as JSON
    Column("spent", Text, nullable=False),  # what the site said was spent by then, as JSON
    Column("halted", Text, nullable=False),  # why it is not served; empty if it is
    Column("time", Float, nullable=False),
)

ROSTERS = Table(
    "rosters",
    METADATA,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("roster", Text, nullable=False),
    Column("signature", String(88), nullable=False),
)

RUNS = Table(
    "runs",
    METADATA,
    Column("run", String(96), primary_key=True),
    Column("plan", Text, nullable=False),  # the signed plan, as JSON
    Column("plan_sha256", String(64), nullable=False),
    Column("plan_name", String(63), nullable=False),
    Column("rounds", Integer, nullable=False),
    Column("quorum", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("round", Integer, nullable=False),
    Column("link_run", String(20)),  # Flower's number of it
    Column("code", String(6)),
    Column("detail", Text),
    Column("proposed_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
)

DECISIONS = Table(
    "decisions",
    METADATA,
    Column("run", String(96), ForeignKey("runs.run"), primary_key=True),
    Column("site", String(63), primary_key=True),
    Column("verdict", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("decided_at", Float, nullable=False),
    Column("body", Text, nullable=False),  # the signed decision, as the site sent it
)

EVENTS = Table(
    "events",
    METADATA,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("run", String(96), ForeignKey("runs.run")),  # none: of the federation itself
    Column("time", Float, nullable=False),
    Column("event", String(40), nullable=False),
    Column("fields", Text, nullable=False),
    Index("events_by_run", "run", "id"),
)

ADAPTERS = Table(
    "adapters",
    METADATA,
    Column("run", String(96), ForeignKey("runs.run"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("sha256", String(64), nullable=False),  # of the file before it was sealed
    Column("bytes", BigInteger, nullable=False),
    Column("content", LargeBinary),  # sealed; only of the newest rounds
)

CHECKPOINTS = Table(
    "checkpoints",
    METADATA,
    Column("run", String(96), ForeignKey("runs.run"), primary_key=True),
    Column("round", Integer, nullable=False),
    Column("content", LargeBinary, nullable=False),  # sealed
)

SECURE_ROUNDS = Table(
    "secure_rounds",
    METADATA,
    Column("run", String(96), ForeignKey("runs.run"), primary_key=True),
    Column("round", Integer, nullable=False),
    Column("content", LargeBinary, nullable=False),  # sealed
)

CERTIFICATES = Table(
    "certificates",
    METADATA,
    Column("run", String(96), ForeignKey("runs.run"), primary_key=True),
    Column("site", String(63), primary_key=True),
    Column("time", Float, nullable=False),
    Column("content", Text, nullable=False),  # signed by the site, as it sent it
)

ADMINS = Table(
    "admins",
    METADATA,
    Column("name", String(63), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("certificate", String(64), nullable=False),  # SHA-256 of the one that counts
    Column("status", String(16), nullable=False),
    Column("since", Float, nullable=False),
)

ACTIONS = Table(
    "actions",
    METADATA,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("time", Float, nullable=False),
    Column("who", String(63), nullable=False),
    Column("role", String(16), nullable=False),
    Column("action", String(40), nullable=False),
    Column("target", String(96), nullable=False),
    Column("outcome", String(16), nullable=False),  # "done", or the code of the refusal
)

CURSORS = Table(
    "cursors",
    METADATA,
    Column("reader", String(63), primary_key=True),  # who goes on from here after a restart
    Column("event", BigInteger, nullable=False),
)
