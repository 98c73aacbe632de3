"""Messages under way: what sites are asked and what they answered, kept until a round is durable.

All that a request needs to know is in memory, and every change is in the link database before anybody
hears of it, so that a process that is killed at any instant finds all it had told. An exchange costs two
statements a site, whatever the number of sites. What is large lies in files beside the database; what
all sites are sent alike, once. Rows and files are sealed.

A site works on one instruction at a time. One that asks for the next without having answered has lost
the last, in the response or in a crash, and is given it again: it recalls from its outbox what it had
worked out already, so nothing is trained or charged twice.

Nothing is synced: after a power cut the last rows may be missing and a file may be torn, which its seal
shows. Both are asked for again.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import struct
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flwr.app import Message, RecordDict

from silotune.errors import SilotuneError
from silotune.flower import messages
from silotune.flower.message_frames import (
    MessageFrame,
    Parts,
    answered_by,
    apart,
    prefix,
    runs,
    together,
)
from silotune.flower.messages import LinkRun
from silotune.trust.files import create_private_folder, replace_file

_log = logging.getLogger(__name__)

_SMALL = 32 << 10  # bytes of pieces that a row holds itself
_IN_MEMORY = 16 << 20  # bytes of pieces that need not be read from their files
_LENGTHS = struct.Struct("!III")  # of the head, of the names, and the number of pieces
_SCHEMA = """
CREATE TABLE IF NOT EXISTS silotune_instructions (
  message_id TEXT PRIMARY KEY, run TEXT NOT NULL, node TEXT NOT NULL, kind TEXT NOT NULL,
  place TEXT NOT NULL, created_at REAL NOT NULL, ttl REAL NOT NULL, sealed BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS silotune_replies (
  message_id TEXT PRIMARY KEY REFERENCES silotune_instructions ON DELETE CASCADE,
  sealed BLOB NOT NULL
) WITHOUT ROWID;
"""
_INSERT = "INSERT INTO silotune_instructions VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


class Seals(Protocol):
    """What seals rows and files: `silotune.trust.vault.Vault`."""

    def seal(self, content: bytes, *, name: str) -> bytes:
        """Encrypt under a name."""
        ...

    def unseal(self, sealed: bytes, *, name: str) -> bytes:
        """Decrypt; raises `SilotuneError` for anything else than what `seal` made."""
        ...


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A message to a node that is not forgotten yet."""

    message_id: str
    run_id: int
    node: int
    kind: str
    group: str
    created_at: float
    ttl: float

    @property
    def expired(self) -> bool:
        """Whether it is too old to be answered."""
        return self.created_at + self.ttl <= time.time()


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """An instruction to be sent."""

    node: int
    kind: str
    group: str
    ttl: float
    content: RecordDict


@dataclass(frozen=True)
class _Kept:
    """A message as it is kept: its pieces here, or in files of these names.

    A name stands for what a frame has: where several files share one, it is theirs with spaces between.
    """

    head: bytes
    pieces: tuple[bytes, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.pieces) or len(self.names)

    @property
    def files(self) -> list[str]:
        return [file for name in self.names for file in name.split(" ")]

    def to_bytes(self) -> bytes:
        names = "\n".join(self.names).encode()
        lengths = [_LENGTHS.pack(len(self.head), len(names), len(self.pieces)), self.head, names]
        sizes = [struct.pack("!I", len(piece)) for piece in self.pieces]
        return b"".join([*lengths, *sizes, *self.pieces])

    @classmethod
    def from_bytes(cls, content: bytes) -> _Kept:
        head, names, number = _LENGTHS.unpack_from(content)
        ends = [_LENGTHS.size, _LENGTHS.size + head, _LENGTHS.size + head + names]
        sizes, start = struct.unpack_from(f"!{number}I", content, ends[2]), ends[2] + 4 * number
        pieces = list[bytes]()
        for size in sizes:
            pieces.append(content[start : start + size])
            start += size
        listed = content[ends[1] : ends[2]].decode().split("\n") if names else []
        return cls(content[ends[0] : ends[1]], tuple(pieces), tuple(listed))


@dataclass
class _Exchanged:
    """An instruction, and what has come of its answer."""

    instruction: Instruction
    content: _Kept
    reply: _Kept | None = None
    coming: list[str] = field(default_factory=list)  # files of a reply that is not whole yet

    @property
    def waits(self) -> bool:
        return self.reply is None and not self.instruction.expired


class LinkMessages:
    """Instructions and replies; safe for many threads, and one process at a time.

    Parameters
    ----------
    database : Path
        The link database, to which two tables are added.
    folder : Path
        For pieces; made if missing.
    vault : Vault
        Seals rows and pieces.
    """

    def __init__(self, database: Path, *, folder: Path, vault: Seals) -> None:
        self._files = _Pieces(folder, vault)
        self._vault, self._lock = vault, threading.RLock()
        self._connection = sqlite3.connect(
            database, timeout=30.0, isolation_level=None, check_same_thread=False
        )
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        self._connection.execute("PRAGMA cache_size = -2000")
        self._connection.executescript(_SCHEMA)
        self._all: dict[str, _Exchanged] = {}
        self._of_node: dict[int, dict[str, _Exchanged]] = {}
        self._answered: dict[int, dict[str, _Exchanged]] = {}  # by run
        self._load()

    # --- the coordinator's side ---

    def send(self, run: LinkRun, outgoing: Iterable[Outgoing]) -> list[str]:
        """Store instructions, in one transaction; their message ids."""
        written: dict[
            int, tuple[str, bytes]
        ] = {}  # the pieces themselves, so that no id comes twice
        made = [self._composed(run, one, written) for one in outgoing]
        rows = [self._row(kept) for kept in made]
        with self._lock:
            with self._transaction() as connection:
                connection.executemany(_INSERT, rows)
            for kept in made:
                self._know(kept)
        return [kept.instruction.message_id for kept in made]

    def instructions(self, run: LinkRun) -> list[Instruction]:
        """Every instruction of a run that was not forgotten, oldest first."""
        with self._lock:
            found = [one.instruction for one in self._all.values()]
        return [one for one in found if one.run_id == run.run_id]

    def replies(self, run: LinkRun, wanted: Collection[str]) -> Iterator[tuple[str, int, Message]]:
        """Whole replies to the wanted instructions: ``(instruction, node, reply)``, one by one."""
        with self._lock:
            answered = self._answered.get(run.run_id, {})
            found = [(i, one) for i, one in answered.items() if i in wanted and one.reply]
        for message_id, one in found:
            assert one.reply is not None
            try:
                pieces = one.reply.pieces or [self._files.read(file) for file in one.reply.files]
                message = together(Parts(one.reply.head, tuple(pieces)))
            except (SilotuneError, OSError, ValueError):
                _log.warning("a reply that was stored can't be read: it is asked for again")
                self._drop_reply(one)
                continue
            yield message_id, one.instruction.node, message

    def is_answered(self, message_id: str) -> bool:
        """Whether there is a whole reply to an instruction."""
        found = self._all.get(message_id)
        return found is not None and found.reply is not None

    def forget(self, instructions: Collection[str]) -> None:
        """Delete instructions and their replies, in one transaction."""
        with self._lock:
            gone = [self._all[i] for i in instructions if i in self._all]
            if not gone:
                return
            with self._transaction() as connection:
                connection.executemany(
                    "DELETE FROM silotune_instructions WHERE message_id = ?",
                    [(one.instruction.message_id,) for one in gone],
                )
            for one in gone:
                self._unknow(one)

    def adopt(self, found: Iterable[tuple[Instruction, Parts, Parts | None]]) -> None:
        """Take over instructions, and replies to them, that an earlier build had stored its own way."""
        for told, content, reply in found:
            if told.message_id in self._all:
                continue  # the process before was killed while it did this
            one = _Exchanged(told, self._filed(told.message_id, content))
            rows, kept = self._row(one), reply and self._filed(f"{told.message_id}.", reply)
            with self._lock, self._transaction() as connection:
                connection.execute(_INSERT, rows)
                self._know(one)
            if kept:
                self._keep_reply(one, kept)

    def forget_run(self, run: LinkRun) -> None:
        """Delete all of a run."""
        self.forget([one.message_id for one in self.instructions(run)])

    # --- a site's side ---

    def waits_for(self, node: int) -> bool:
        """Whether an instruction waits for the node. Asks no database, and may be asked anywhere."""
        return self._next(node) is not None

    def first_frame(self, node: int) -> tuple[bytes, ...] | None:
        """The oldest instruction that waits for a node, as its first frame: prefix and pieces."""
        found = self._next(node)
        if found is None:
            return None
        pieces = self.pieces(node, found.instruction.message_id, 0)
        return prefix(found.content.head, number=0, of=found.content.count), *pieces

    def pieces(self, node: int, message_id: str, number: int) -> tuple[bytes, ...]:
        """What one frame of an instruction has; nothing of what is not the node's, or has gone."""
        found = self._of_node.get(node, {}).get(message_id)
        if found is None or not 0 <= number < found.content.count:
            return ()
        if found.content.pieces:
            return (found.content.pieces[number],)
        files = found.content.names[number].split(" ")
        return tuple(self._files.read(file, keep=True) for file in files)

    def take(self, node: int, frame: MessageFrame) -> bool | None:
        """Keep a frame of a node's reply; the last makes it whole.

        Returns
        -------
        bool or None
            Whether the reply is whole now; None if nobody waits for it: withdrawn, expired, answered.

        Raises
        ------
        ValueError
            It is no reply, or a frame before it is missing.
        """
        message_id = answered_by(frame.head)
        found = self._of_node.get(node, {}).get(message_id)
        if found is None or not found.waits:
            return None
        if frame.of <= 1 and len(frame.piece) <= _SMALL:
            return self._keep_reply(found, _Kept(frame.head, (bytes(frame.piece),) * frame.of))
        if frame.number == 0:
            self._files.release(found.coming)
            found.coming = []
        if frame.number != len(found.coming):
            raise ValueError("a piece of the reply before this one is missing")
        name = f"{message_id}.{frame.number}"
        self._files.write(name, bytes(frame.piece))
        with self._lock:
            if message_id not in self._all:  # withdrawn meanwhile
                self._files.release([name])
                return None
            found.coming.append(name)
        if frame.number + 1 < frame.of:
            return False
        return self._keep_reply(found, _Kept(frame.head, names=tuple(found.coming)))

    # --- parts ---

    def _composed(
        self, run: LinkRun, one: Outgoing, written: dict[int, tuple[str, bytes]]
    ) -> _Exchanged:
        message_id = secrets.token_hex(32)
        message = messages.instruction(
            run, node=one.node, kind=one.kind, group=one.group, ttl=one.ttl, content=one.content
        )
        message.metadata.__dict__["_message_id"] = message_id
        instruction = Instruction(
            message_id=message_id,
            run_id=run.run_id,
            node=one.node,
            kind=one.kind,
            group=one.group,
            created_at=message.metadata.created_at,
            ttl=one.ttl,
        )
        return _Exchanged(instruction, self._filed(message_id, apart(message), written))

    def _filed(
        self, name: str, parts: Parts, written: dict[int, tuple[str, bytes]] | None = None
    ) -> _Kept:
        """A message as it is kept, its pieces in files if they are large; those of `written` are."""
        if sum(map(len, parts.pieces)) <= _SMALL:
            return _Kept(parts.head, tuple(map(b"".join, runs(parts.pieces))))
        written = {} if written is None else written
        for number, piece in enumerate(parts.pieces):
            if id(piece) in written:
                self._files.hold(written[id(piece)][0])
            else:
                written[id(piece)] = f"{name}-{number}", piece
                self._files.write(f"{name}-{number}", piece)
        names = (" ".join(written[id(p)][0] for p in run) for run in runs(parts.pieces))
        return _Kept(parts.head, names=tuple(names))

    def _keep_reply(self, found: _Exchanged, reply: _Kept) -> bool | None:
        message_id = found.instruction.message_id
        sealed = self._vault.seal(reply.to_bytes(), name=_reply_name(message_id))
        with self._lock:
            if message_id not in self._all or found.reply is not None:
                self._files.release(reply.files)
                return None
            with self._transaction() as connection:
                connection.execute(
                    "INSERT INTO silotune_replies VALUES (?, ?)", (message_id, sealed)
                )
            found.reply, found.coming = reply, []
            self._answered.setdefault(found.instruction.run_id, {})[message_id] = found
        return True

    def _drop_reply(self, found: _Exchanged) -> None:
        message_id = found.instruction.message_id
        with self._lock, self._transaction() as connection:
            connection.execute("DELETE FROM silotune_replies WHERE message_id = ?", (message_id,))
            self._files.release(found.reply.files if found.reply else ())
            found.reply = None
            self._answered.get(found.instruction.run_id, {}).pop(message_id, None)

    def _next(self, node: int) -> _Exchanged | None:
        waiting = list(self._of_node.get(node, {}).values())
        return next((one for one in waiting if one.waits), None)

    def _row(self, one: _Exchanged) -> tuple[str | float | bytes, ...]:
        told = one.instruction
        address = (told.message_id, str(told.run_id), str(told.node), told.kind, told.group)
        sealed = self._vault.seal(one.content.to_bytes(), name=told.message_id)
        return (*address, told.created_at, told.ttl, sealed)

    def _know(self, one: _Exchanged) -> None:
        told = one.instruction
        self._all[told.message_id] = one
        self._of_node.setdefault(told.node, {})[told.message_id] = one
        if one.reply is not None:
            self._answered.setdefault(told.run_id, {})[told.message_id] = one

    def _unknow(self, one: _Exchanged) -> None:
        told = one.instruction
        del self._all[told.message_id]
        self._of_node[told.node].pop(told.message_id, None)
        self._answered.get(told.run_id, {}).pop(told.message_id, None)
        self._files.release(one.content.files)
        self._files.release(one.reply.files if one.reply else one.coming)

    def _load(self) -> None:
        """Find again what an earlier process had stored; what is torn is as if it had not come."""
        query = (
            "SELECT i.*, r.sealed FROM silotune_instructions i LEFT JOIN silotune_replies r"
            " USING (message_id) ORDER BY created_at"
        )
        torn = list[str]()
        for message_id, run, node, kind, group, created, ttl, sealed, reply in list(
            self._connection.execute(query)
        ):
            told = Instruction(
                message_id=message_id,
                run_id=int(run),
                node=int(node),
                kind=kind,
                group=group,
                created_at=created,
                ttl=ttl,
            )
            content = self._stored(sealed, message_id)
            if content is None:
                torn.append(message_id)
                continue
            found = _Exchanged(told, content)
            if reply is not None:
                found.reply = self._stored(reply, _reply_name(message_id))
                if found.reply is None:
                    self._drop_reply(found)
            self._know(found)
        with self._transaction() as connection:
            connection.executemany(
                "DELETE FROM silotune_instructions WHERE message_id = ?", [(i,) for i in torn]
            )
        self._files.remove_unused()

    def _stored(self, sealed: bytes, name: str) -> _Kept | None:
        try:
            kept = _Kept.from_bytes(self._vault.unseal(sealed, name=name))
            for file in kept.files:
                self._files.read(file)
        except (SilotuneError, OSError, ValueError, struct.error):
            _log.info("a message under way was cut off by a crash: it is asked for again")
            return None
        for file in kept.files:
            self._files.hold(file)
        return kept

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


class _Pieces:
    """Sealed files, each removed when nothing names it any more; the newest are in memory too."""

    def __init__(self, folder: Path, vault: Seals) -> None:
        self._folder, self._vault = folder, vault
        create_private_folder(folder)
        self._named: Counter[str] = Counter()
        self._recent: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def write(self, name: str, piece: bytes) -> None:
        """Keep a piece under a name of its own; one that is there is replaced."""
        sealed = self._vault.seal(piece, name=name)
        replace_file(self._folder / name, sealed, to_disk=False)
        with self._lock:
            self._named[name] = 1
            self._remember(name, piece)

    def hold(self, name: str) -> None:
        """Something more names it."""
        with self._lock:
            self._named[name] += 1

    def read(self, name: str, *, keep: bool = False) -> bytes:
        """A piece; with `keep`, it is likely to be read again soon."""
        with self._lock:
            found = self._recent.get(name)
            if found is not None:
                self._recent.move_to_end(name)
        if found is None:
            sealed = (self._folder / name).read_bytes()
            found = self._vault.unseal(sealed, name=name)
            if keep:
                with self._lock:
                    self._remember(name, found)
        return found

    def release(self, names: Iterable[str]) -> None:
        """One thing less names these."""
        for name in names:
            with self._lock:
                self._named[name] -= 1
                if self._named[name] > 0:
                    continue
                del self._named[name]
                self._recent.pop(name, None)
            (self._folder / name).unlink(missing_ok=True)

    def remove_unused(self) -> None:
        """Remove what a process that ended half-way has left."""
        for path in self._folder.iterdir():
            if path.name not in self._named:
                path.unlink()

    def _remember(self, name: str, piece: bytes) -> None:
        self._recent[name] = piece
        self._recent.move_to_end(name)
        while sum(map(len, self._recent.values())) > _IN_MEMORY and len(self._recent) > 1:
            self._recent.popitem(last=False)


def _reply_name(message_id: str) -> str:
    return f"{message_id} reply"
