"""The ledger's table: a hash chain of entries, in SQLite.

The rules of the chain and of its head file are `silotune.trust.chain`'s. Here they meet what SQLite
promises: a row is committed, and on the disk, before the head follows; whoever appends holds the only
right to, and has seen every row of every process.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.errors import LedgerDamaged, PrivacyError
from silotune.trust.chain import (
    GENESIS,
    Chain,
    Head,
    Value,
    require_counter_signature,
    signature_fields,
)
from silotune.trust.files import replace_file, require_private

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


@dataclass(frozen=True)
class LedgerEntry:
    """What a row says, without its place in the chain; unused columns are None."""

    kind: str
    dataset: str
    run: str
    time: str
    round: int | None = None
    release: str | None = None
    plan_sha256: str | None = None
    event: str | None = None
    budget: str | None = None
    payload_sha256: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table: an entry in its place."""

    seq: int
    previous: str
    entry: LedgerEntry
    hash: str

    @classmethod
    def after(cls, head: Head, entry: LedgerEntry) -> Row:
        """The row that appends `entry` to a chain that ends at `head`."""
        end = head.after(vars(entry))
        return cls(end.seq, head.hash, entry, end.hash)

    @property
    def head(self) -> Head:
        """The head of a chain that ends with this row."""
        return Head(self.seq, self.hash)

    @property
    def content(self) -> dict[str, Value]:
        """The columns of its entry."""
        return vars(self.entry)

    def as_dict(self) -> dict[str, Value]:
        """Plain columns, in the order of the table."""
        return {"seq": self.seq, "previous": self.previous, **self.content, "hash": self.hash}


_BUSY_SECONDS = 60.0
_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS entries (
        seq INTEGER PRIMARY KEY, previous TEXT NOT NULL, kind TEXT NOT NULL, dataset TEXT NOT NULL,
        run TEXT NOT NULL, round INTEGER, release TEXT, plan_sha256 TEXT, event TEXT, budget TEXT,
        payload_sha256 TEXT, time TEXT NOT NULL, hash TEXT NOT NULL UNIQUE) STRICT""",
    """CREATE UNIQUE INDEX IF NOT EXISTS one_charge_a_release ON entries (run, round, release)
        WHERE kind = 'charge'""",
    """CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entries
        BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entries
        BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    # INSERT OR REPLACE removes rows without firing the trigger above.
    """CREATE TRIGGER IF NOT EXISTS only_at_the_end BEFORE INSERT ON entries
        WHEN NEW.seq <> (SELECT coalesce(max(seq), 0) + 1 FROM entries)
        BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
)
_SURROUNDINGS = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
}
_REMEDY = "Nothing was released. Free the disk or end the other process, then start again."
_GUARDS = {"no_update", "no_delete", "only_at_the_end", "one_charge_a_release"}


_ENTRY_COLUMNS = tuple(LedgerEntry.__dataclass_fields__)
_NAMES = ("seq", "previous", *_ENTRY_COLUMNS, "hash")
_COLUMNS = ", ".join(_NAMES)
_PLACES = ", ".join(f":{name}" for name in _NAMES)
_INSERT = f"INSERT INTO entries ({_COLUMNS}) VALUES ({_PLACES})"  # noqa: S608 - fixed names
_SELECT = f"SELECT {_COLUMNS} FROM entries WHERE seq >= ? ORDER BY seq"  # noqa: S608


class LedgerTable:
    """The table, its head file and the counter-signed head, safe for many threads and processes.

    Parameters
    ----------
    path : Path
        The SQLite file; the head lies beside it as ``<name>.head``, a counter-signed head as
        ``<name>.witness``. All have mode 0600.
    observe : callable
        Called once for every row, in order, when the row is first seen: at opening, and later for
        rows appended here or by another process.
    create : bool
        Start an empty chain if there is none.
    to_disk : bool
        Force every row to the disk before going on. False is for the sites of a simulation, which
        release nothing to anybody: rows then survive the end of any process, not a power cut.

    Raises
    ------
    LedgerDamaged
        Missing, edited, truncated or rolled back.
    FileExposed
        Another account can read or write one of the files.

    Notes
    -----
    Rollback journal with ``TRUNCATE`` and ``synchronous = FULL``: SQLite then also forces the
    truncation to the disk, so a power cut can't bring a journal back that undoes a committed row,
    and there is no second file (WAL) without which the table is old.
    """

    def __init__(
        self,
        path: Path,
        *,
        observe: Callable[[Row], None],
        create: bool = True,
        to_disk: bool = True,
    ) -> None:
        self.path, self._to_disk = path, to_disk
        self._chain = Chain(path, called="ledger", part="row", damaged=LedgerDamaged)
        self._witness_path = path.with_name(path.name + ".witness")
        self._observe = observe
        self._newest: Row | None = None
        self._mutex = threading.RLock()
        with _storage_errors(path):
            self._chain.prepare(create=create, to_disk=to_disk)
            if self._witness_path.exists():
                require_private(self._witness_path)
            self._identity = _identity(path)
            self._db = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            with _storage_errors(path):
                self._db.execute("PRAGMA journal_mode = TRUNCATE")
                self._db.execute(f"PRAGMA synchronous = {'FULL' if to_disk else 'OFF'}")
                self._create_schema()
            self.verify()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file; the object can't be used afterwards."""
        with self._mutex:
            self._db.close()

    @property
    def head(self) -> Head:
        """The newest row's place, as on the disk now."""
        with self.transaction():
            return self._chain.end

    @contextmanager
    def transaction(self) -> Iterator[Callable[[LedgerEntry], None]]:
        """Hold the only right to append; yields the function that does, for at most one row.

        Inside, every committed row of every process has been observed. The row is on the disk, and
        so is the head, when the block has been left without an exception.

        Raises
        ------
        LedgerDamaged
            Table and head disagree.
        PrivacyError
            The file can't be written (full disk), or another process holds it for a minute.
        """
        appended: list[Row] = []

        def append(entry: LedgerEntry) -> None:
            assert not appended, "a transaction appends one row: the head may lag by one only"
            row = Row.after(self._chain.end, entry)
            self._db.execute(_INSERT, row.as_dict())
            appended.append(row)

        with self._mutex, _storage_errors(self.path):
            with self._locked():
                yield append
            if appended:
                # Looking again moves the head up to the committed row, under the lock: heads never
                # go back, whoever comes between.
                with self._locked():
                    pass

    def hash_of(self, seq: int) -> str:
        """Hash of a row by its number; empty if there is no such row."""
        with self.transaction():
            return self._hash_of(seq)

    def witnessed(self) -> Head | None:
        """The counter-signed head that is kept beside the table, checked by `verify`."""
        with self._mutex, _storage_errors(self.path):
            return self._kept_witness(trusted=None)

    def rows(self) -> list[Row]:
        """Every row, oldest first, straight from the file."""
        with self._mutex, _storage_errors(self.path):
            return list(self._read(0))

    def verify(self, *, trusted: Ed25519PublicKey | None = None) -> Head:
        """Check the whole file from its first row; returns the head.

        Parameters
        ----------
        trusted : Ed25519PublicKey, optional
            The coordinator's key: the counter-signed head must be there and be signed by it.

        Raises
        ------
        LedgerDamaged
            Edited, truncated, rolled back, or its guards against changes removed.
        """
        with self._mutex, _storage_errors(self.path), self._locked():
            found = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
            if not found >= _GUARDS:
                raise LedgerDamaged(f"{self.path}: its guards against changes were removed")
            if self._db.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise LedgerDamaged(f"{self.path}: SQLite finds the file corrupt")
            end = GENESIS
            for row in self._chain.checked(self._read(0)):
                end = row.head
            witnessed = self._kept_witness(trusted=trusted)
            if witnessed is not None:
                self._require_passed(witnessed)
            elif trusted is not None:
                raise LedgerDamaged(f"{self._witness_path} is missing")
            return end

    def witness(self, head: Head, signature: bytes, key: Ed25519PublicKey) -> None:
        """Keep a head that the other side has counter-signed, if it is newer than the kept one.

        Raises
        ------
        LedgerDamaged
            The signature is wrong, or the chain does not pass through that head: then the other
            side remembers rows that are gone here.
        """
        self._chain.require_signed(head, signature, key)
        content = {**asdict(head), **signature_fields(signature, key)}
        with self._mutex, _storage_errors(self.path), self._locked():
            self._require_passed(head)
            kept = self._kept_witness(trusted=None)
            if kept is None or kept.seq <= head.seq:
                # The disk is not waited for, and a file system waits if a file is replaced: whoever
                # signed keeps it too, and the site's audit log does.
                self._witness_path.unlink(missing_ok=True)
                replace_file(self._witness_path, json.dumps(content).encode(), to_disk=False)

    def _create_schema(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        if not self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            for statement in _SCHEMA:
                self._db.execute(statement)
        self._db.execute("COMMIT")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._catch_up()
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _catch_up(self) -> None:
        """Observe rows that are new here, then bring table and head together."""
        if self._identity != _identity(self.path):
            raise LedgerDamaged(f"{self.path} was replaced while it was in use")
        rows = self._read(self._chain.end.seq)
        if self._newest is not None and next(rows, None) != self._newest:
            raise LedgerDamaged(f"{self.path} was truncated or edited while it was in use")
        for row in rows:
            self._chain.take(row)
            self._observe(row)
            self._newest = row
        if not self._chain.agrees():
            self._chain.write_head(to_disk=self._to_disk)

    def _read(self, first: int) -> Iterator[Row]:
        """Rows from number `first` on, unchecked."""
        for seq, previous, *columns, row_hash in self._db.execute(_SELECT, (first,)):
            named = dict(zip(_ENTRY_COLUMNS, columns, strict=True))
            yield Row(seq, previous, LedgerEntry(**named), row_hash)

    def _hash_of(self, seq: int) -> str:
        found = self._db.execute("SELECT hash FROM entries WHERE seq = ?", (seq,)).fetchone()
        return str(found[0]) if found else ""

    def _require_passed(self, head: Head) -> None:
        found = self._hash_of(head.seq) if head.seq else GENESIS.hash
        self._chain.require_passed(head.seq, head.hash, found)

    def _kept_witness(self, *, trusted: Ed25519PublicKey | None) -> Head | None:
        """The stored counter-signed head, with its signature checked."""
        if not self._witness_path.exists() or not self._witness_path.stat().st_size:
            return None  # a power cut may leave an empty file
        try:
            kept = json.loads(self._witness_path.read_bytes())
            head = Head(int(kept["seq"]), str(kept["hash"]))
            require_counter_signature(head, kept, trusted=trusted)
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise LedgerDamaged(f"{self._witness_path} is no counter-signed head: {exc}") from exc
        return head


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as exc:
        raise LedgerDamaged(f"{path} is missing") from exc
    return found.st_dev, found.st_ino


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Say of a failure of SQLite or the disk whether the content or its surroundings are at fault."""
    try:
        yield
    except sqlite3.Error as exc:
        # Extended result codes keep the primary one in their low byte.
        if getattr(exc, "sqlite_errorcode", 0) & 0xFF in _SURROUNDINGS:
            raise PrivacyError(f"{path} can't be used: {exc}", remedy=_REMEDY) from exc
        raise LedgerDamaged(f"{path}: {exc}") from exc
    except OSError as exc:
        raise PrivacyError(f"{path} can't be used: {exc.strerror}", remedy=_REMEDY) from exc
