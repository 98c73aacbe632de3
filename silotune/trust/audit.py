"""An audit log: a hash chain of append-only JSON lines, and how auditors read and compare two of them.

The rules of the chain and of its head file are `silotune.trust.chain`'s. Every line is forced to the
disk before `AuditLog.append` returns, or anybody is told of it, apart from counter-signatures, which
are not waited for; a line that a crash left half written is cut off.

Whoever rewrites log *and* head is found out by the other side: site and coordinator sign each other's
heads each round (`AuditHead.sign`), keep the signatures (`AuditLog.witness`), and log what they signed
(`AuditLog.counter_signed`).

The whole file is read when it is opened and by `AuditLog.verify`. In between only new lines are: the
hashes of those that were checked are held in memory, 32 bytes a line.

A line is the JSON object ``{"seq", "time", "kind", …, "previous", "hash"}`` with sorted keys and no
white space; ``hash`` is the SHA-256, in hex, of the same text without ``hash``.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from silotune.errors import EnvironmentFault
from silotune.plan.document import canonical_json
from silotune.trust.chain import (
    GENESIS,
    Chain,
    Head,
    Value,
    require_counter_signature,
    signature_fields,
)
from silotune.trust.errors import AuditLogDamaged
from silotune.trust.signed import Signing

_SIGNING = Signing("silotune audit head v1", "head", AuditLogDamaged)

OWN_FIELDS = frozenset({"seq", "time", "kind", "previous", "hash"})


@dataclass(frozen=True)
class AuditHead:
    """The end of an audit log.

    Attributes
    ----------
    owner : str
        Whose log: the site's name, or ``coordinator``.
    seq : int
        Number of its newest line.
    hash : str
        Hash of that line, in hex.
    """

    owner: str
    seq: int
    hash: str

    def signed_bytes(self) -> bytes:
        """What a counter-signature covers."""
        text = json.dumps([self.owner, self.seq, self.hash])
        return _SIGNING.covered(text)

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """Counter-sign this head, as the other side does."""
        return key.sign(self.signed_bytes())

    @property
    def place(self) -> Head:
        """Its place in the log."""
        return Head(self.seq, self.hash)


@dataclass(frozen=True)
class Line:
    """One line of a log."""

    seq: int
    time: str
    kind: str
    previous: str
    hash: str
    fields: Mapping[str, Value] = field(default_factory=dict)

    @classmethod
    def after(cls, place: Head, *, time: str, kind: str, fields: Mapping[str, Value]) -> Line:
        """The line that continues a log that ends at `place`.

        Raises
        ------
        ValueError
            A field has a name of the log's own, or is no JSON value.
        """
        if clash := OWN_FIELDS & fields.keys():
            raise ValueError(f"the log itself has the fields {sorted(clash)}")
        try:
            end = place.after({**fields, "time": time, "kind": kind})
        except TypeError as exc:
            raise ValueError(f"{kind!r}: a field is no JSON value") from exc
        return cls(end.seq, time, kind, place.hash, end.hash, dict(fields))

    @classmethod
    def parse(cls, text: bytes) -> Line:
        """Read a line as it is in the file; its hash and place are checked by the chain.

        Raises
        ------
        ValueError
            It is no line of an audit log.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or not found.keys() >= OWN_FIELDS:
            raise ValueError("not a line of an audit log")
        right = {name: int if name == "seq" else str for name in OWN_FIELDS}
        if any(type(found[name]) is not kind for name, kind in right.items()):
            raise ValueError("a field of the log's own is of another type")
        if canonical_json(found).encode() + b"\n" != text:  # no two readers read two things
            raise ValueError("not in the form that the log writes")
        own = {name: found.pop(name) for name in OWN_FIELDS}
        return cls(**own, fields=found)

    @property
    def head(self) -> Head:
        """Where a log ends that ends with this line."""
        return Head(self.seq, self.hash)

    @property
    def content(self) -> dict[str, Value]:
        """What it says, and when."""
        return {**self.fields, "time": self.time, "kind": self.kind}

    def as_dict(self) -> dict[str, Value]:
        """All of it, as it is in the file."""
        return {**self.fields, **{name: getattr(self, name) for name in OWN_FIELDS}}

    def to_bytes(self) -> bytes:
        """The line as it is in the file, with its end."""
        return canonical_json(self.as_dict()).encode() + b"\n"


def signed_fields(head: AuditHead, signature: bytes, key: Ed25519PublicKey) -> dict[str, Value]:
    """Fields of a line about a counter-signed head."""
    return {
        "log": head.owner,
        "log_seq": head.seq,
        "log_hash": head.hash,
        **signature_fields(signature, key),
    }


def signed_head(line: Line, *, trusted: Ed25519PublicKey | None = None) -> AuditHead:
    """The head that such a line is about.

    Raises
    ------
    ValueError
        The line is not one, its signature is wrong, or `trusted` is another key.
    """
    seq = line.fields.get("log_seq")
    if not isinstance(seq, int):
        raise ValueError("no counter-signature")
    head = AuditHead(str(line.fields.get("log")), seq, str(line.fields.get("log_hash")))
    require_counter_signature(head, line.fields, trusted=trusted)
    return head


AUDIT_FILE = "audit.jsonl"
"""Name of the audit log in the state folder of a site or a coordinator."""

WITNESSED, COUNTER_SIGNED = "witnessed", "counter_signed"


class AuditLog:
    """One side's audit log. Any number of threads and processes may append to the same file.

    Parameters
    ----------
    path : Path
        The JSON lines; the head lies beside it as ``<name>.head``. Both have mode 0600.
    owner : str, optional
        Whose log it is; a new one is started if there is none. Without it the log must be there.

    Attributes
    ----------
    owner : str
        Whose log it is.

    Raises
    ------
    AuditLogDamaged
        Missing, edited, cut or rolled back, or another owner's.
    FileExposed
        Other accounts of the machine may read or write it.
    EnvironmentFault
        The disk can't be read or written.
    """

    def __init__(self, path: Path, *, owner: str | None = None) -> None:
        self.path = path
        self._chain = Chain(path, called="audit log", part="line", damaged=AuditLogDamaged)
        self._mutex = threading.RLock()
        self._size = 0
        self._hashes = bytearray()  # of every line that was checked, in order
        with _disk_errors(path):
            self._chain.prepare(create=owner is not None)
        with self._locked() as descriptor:
            if self._chain.end == GENESIS:
                self._write(descriptor, "opened", {"owner": owner or ""})
            first = next(self._read(descriptor, 0))[0]
        self.owner = str(first.fields.get("owner"))
        if first.kind != "opened" or owner not in {None, self.owner}:
            raise AuditLogDamaged(f"{path} is the log of {self.owner!r}, not of {owner!r}")

    @property
    def head(self) -> AuditHead:
        """The newest line's place, as on the disk now."""
        with self._locked() as descriptor:
            self._settle(descriptor)
            return self._named(self._chain.end)

    def append(self, kind: str, /, **fields: Value) -> AuditHead:
        """Add a line; when this returns, it is on the disk.

        Parameters
        ----------
        kind : str
            What happened, in a word or two: ``"plan_approved"``.
        fields : JSON values
            The particulars. Never a record, and never a secret.

        Raises
        ------
        ValueError
            A field has a name of the log's own, or is no JSON value.
        """
        with self._locked() as descriptor:
            self._write(descriptor, kind, fields)
            return self._named(self._chain.end)

    def witness(self, head: AuditHead, signature: bytes, key: Ed25519PublicKey) -> None:
        """Keep the other side's signature over a head of this log, as a line of it.

        Raises
        ------
        AuditLogDamaged
            The signature is wrong, or this log never had that head: then the other side remembers
            lines that are gone here.
        """
        self._chain.require_signed(head, signature, key)
        with self._locked() as descriptor:
            own = self._hash_of(head.seq) if head.owner == self.owner else ""
            self._chain.require_passed(head.seq, head.hash, own)
            # Not waited for: nobody is told of this line before the next call has forced it to the
            # disk, and a power cut until then leaves the log as if the signature had not come.
            fields = signed_fields(head, signature, key)
            self._write(descriptor, WITNESSED, fields, durably=False)

    def hash_of(self, seq: int) -> str:
        """Hash of a line by its number; empty if there is no such line."""
        with self._locked():
            return self._hash_of(seq)

    def counter_signed(self, head: AuditHead, signature: bytes, key: Ed25519PublicKey) -> None:
        """Log that this side signed the other's `head` with its own `key`."""
        self.append(COUNTER_SIGNED, **signed_fields(head, signature, key))

    def lines(self) -> list[Line]:
        """Every line, oldest first, straight from the file."""
        with self._locked() as descriptor:
            return [line for line, _ in self._read(descriptor, 0)]

    def verify(self, *, trusted: Ed25519PublicKey | None = None) -> AuditHead:
        """Check the whole log: its chain, its head, and every counter-signature in it.

        Parameters
        ----------
        trusted : Ed25519PublicKey, optional
            The other side's key: heads that another key signed are refused.

        Raises
        ------
        AuditLogDamaged
            With the first thing that is wrong.
        """
        place, known = GENESIS, set[Head]()
        for line in self._chain.checked(self.lines()):
            place = line.head
            known.add(place)
            if line.kind in {WITNESSED, COUNTER_SIGNED}:
                self._check_signed(line, known, trusted)
        return self._named(place)

    def _check_signed(self, line: Line, known: set[Head], trusted: Ed25519PublicKey | None) -> None:
        own = line.kind == WITNESSED
        try:
            head = signed_head(line, trusted=trusted if own else None)
        except ValueError as exc:
            raise AuditLogDamaged(f"{self.path}: line {line.seq}: {exc}") from exc
        if own and head.place not in known:
            raise AuditLogDamaged(
                f"{self.path}: line {line.seq} witnesses a line that is not there"
            )

    def _named(self, place: Head) -> AuditHead:
        return AuditHead(self.owner, place.seq, place.hash)

    # --- the file ---

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the only right to append, having seen every line of every process."""
        with self._mutex, _disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._catch_up(descriptor)
                yield descriptor
            finally:
                os.close(descriptor)

    def _catch_up(self, descriptor: int) -> None:
        """Check lines that are new here, then bring log and head together."""
        size = os.fstat(descriptor).st_size
        if size < self._size:
            raise AuditLogDamaged(f"{self.path} was cut while it was in use")
        for line, end in self._read(descriptor, self._size):
            self._take(line, end)
        settled = self._chain.agrees()
        if self._size < size:  # the beginning of a line that a crash cut short
            self._cut(descriptor)
        if not settled:
            self._settle(descriptor)

    def _settle(self, descriptor: int) -> None:
        """Bring the head up to the newest line."""
        if self._chain.read_head() != self._chain.end:
            os.fsync(descriptor)
            self._chain.write_head()

    def _read(self, descriptor: int, start: int) -> Iterator[tuple[Line, int]]:
        """Whole lines from an offset on, each with the offset of its end."""
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(start)
            for number, text in enumerate(file):
                if not text.endswith(b"\n"):
                    return
                start += len(text)
                try:
                    line = Line.parse(text)
                except ValueError as exc:
                    raise AuditLogDamaged(
                        f"{self.path}: the text {number + 1} lines after byte {start - len(text)} "
                        "is no line of an audit log"
                    ) from exc
                yield line, start

    def _write(
        self, descriptor: int, kind: str, fields: dict[str, Value], *, durably: bool = True
    ) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = Line.after(self._chain.end, time=now, kind=kind, fields=fields)
        text = line.to_bytes()
        try:
            if os.write(descriptor, text) < len(text):
                raise OSError(28, "No space left on device")
            if durably:
                os.fsync(descriptor)
        except OSError:
            self._cut(descriptor)
            raise
        self._take(line, self._size + len(text))
        if durably:
            self._chain.write_head()

    def _take(self, line: Line, end: int) -> None:
        self._chain.take(line, waited=line.kind != WITNESSED)
        self._size = end
        self._hashes += bytes.fromhex(line.hash)

    def _hash_of(self, seq: int) -> str:
        return self._hashes[32 * (seq - 1) : 32 * seq].hex() if seq > 0 else ""

    def _cut(self, descriptor: int) -> None:
        os.ftruncate(descriptor, self._size)
        os.fsync(descriptor)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise EnvironmentFault(
            f"{path} can't be used: {exc.strerror}",
            remedy="Free the disk or correct the permissions, then start again.",
        ) from exc


ExportFormat = Literal["jsonl", "csv"]


def open_log(place: Path) -> AuditLog:
    """The audit log at a file, or in a state folder; it must be there.

    Raises
    ------
    AuditLogDamaged
        No log there, or not a whole one.
    """
    return AuditLog(place / AUDIT_FILE if place.is_dir() else place)


def select(
    lines: Iterable[Line], *, kind: str = "", run: str = "", since: str = "", until: str = ""
) -> list[Line]:
    """Lines of a kind, of a run, and between two times (ISO 8601, compared as text in UTC)."""
    return [
        line
        for line in lines
        if (not kind or line.kind == kind)
        and (not run or line.fields.get("run") == run)
        and line.time >= since
        and (not until or line.time <= until)
    ]


def export(lines: Sequence[Line], form: ExportFormat) -> str:
    """Lines as JSON lines, byte for byte as they are in the log, or as CSV for a spreadsheet."""
    if form == "jsonl":
        return "".join(line.to_bytes().decode() for line in lines)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["seq", "time", "kind", "particulars", "hash"])
    for line in lines:
        particulars = json.dumps(dict(line.fields), sort_keys=True)
        writer.writerow([line.seq, line.time, line.kind, particulars, line.hash])
    return out.getvalue()


def compare(log: AuditLog, other: AuditLog) -> int:
    """Hold a log against what the other side signed of it.

    Returns
    -------
    int
        Heads of `log` that the other side's log has signed and that are in `log`.

    Raises
    ------
    AuditLogDamaged
        `log` lacks or contradicts a line that the other side has signed, or shows a signature
        that the other side has no memory of.
    """
    lines = log.lines()
    places, remembered = {line.head for line in lines}, set()
    signed = [line for line in other.lines() if line.kind == COUNTER_SIGNED]
    # A coordinator's log is witnessed by every site: only what `other` signs with is its business.
    keys = {line.fields.get("key") for line in signed}
    for line in signed:
        if line.fields.get("log") == log.owner:
            head = signed_head(line)
            if head.place not in places:
                raise AuditLogDamaged(
                    f"{other.path} counter-signed line {head.seq} of {log.owner!r}, "
                    f"and {log.path} does not have that line"
                )
            remembered.add(head.place)
    for line in lines:
        if line.kind == WITNESSED and line.fields.get("key") in keys:
            head = signed_head(line)
            if head.place not in remembered and head.seq <= _newest(remembered):
                raise AuditLogDamaged(
                    f"{other.path} lacks the counter-signature over line {head.seq} that "
                    f"{log.path} shows"
                )
    return len(remembered)


def _newest(places: Iterable[Head]) -> int:
    return max((place.seq for place in places), default=0)
