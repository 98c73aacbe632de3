"""An audit log: append-only JSON lines, each carrying the hash of the line before it.

Every line is forced to the disk before `AuditLog.append` returns, or anybody is told of it. The newest
hash is kept a second time in a head file, as in `silotune.privacy.chain`: the log may be one line ahead
of its head (a crash between the two), apart from counter-signatures, which are not waited for; a line
that a crash left half written is cut off; anything else is damage.

Whoever rewrites log *and* head is found out by the other side: site and coordinator sign each other's
heads each round (`AuditHead.sign`), keep the signatures (`AuditLog.witness`), and log what they signed
(`AuditLog.counter_signed`).

The whole file is read when it is opened and by `AuditLog.verify`. In between only new lines are: the
hashes of those that were checked are held in memory, 32 bytes a line.

A line is the JSON object ``{"seq", "time", "kind", …, "previous", "hash"}`` with sorted keys and no
white space; ``hash`` is the SHA-256, in hex, of the same text without ``hash``.

What an audit log holds: lines, their places in the hash chain, and heads to be counter-signed.

Audit logs as an auditor reads them: selected lines, exports, and two sides compared.
"""

from __future__ import annotations

import base64
import csv
import fcntl
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from silotune.errors import EnvironmentFault
from silotune.trust.errors import AuditLogDamaged
from silotune.trust.files import create_file, create_private_folder, replace_file, require_private

Value = str | int | float | bool | None | list[Any] | dict[str, Any]
Place = tuple[int, str]
"""Number and hash of a line."""

START: Place = (0, "0" * 64)
"""The place before the first line."""

OWN_FIELDS = frozenset({"seq", "time", "kind", "previous", "hash"})

_CONTEXT = b"silotune audit head v1\0"


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
        return _CONTEXT + json.dumps([self.owner, self.seq, self.hash]).encode()

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """Counter-sign this head (Ed25519, RFC 8032), as the other side does."""
        return key.sign(self.signed_bytes())


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
    def after(cls, place: Place, *, time: str, kind: str, fields: Mapping[str, Value]) -> Line:
        """The line that continues a log that ends at `place`.

        Raises
        ------
        ValueError
            A field has a name of the log's own, or is no JSON value.
        """
        if clash := OWN_FIELDS & fields.keys():
            raise ValueError(f"the log itself has the fields {sorted(clash)}")
        seq, previous = place[0] + 1, place[1]
        content = {**fields, "seq": seq, "time": time, "kind": kind, "previous": previous}
        try:
            digest = hashlib.sha256(_canonical(content)).hexdigest()
        except TypeError as exc:
            raise ValueError(f"{kind!r}: a field is no JSON value") from exc
        return cls(seq, time, kind, previous, digest, dict(fields))

    @classmethod
    def parse(cls, text: bytes) -> Line:
        """Read a line as it is in the file; its hash and place are checked by `follows`.

        Raises
        ------
        ValueError
            It is no line of an audit log.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or not found.keys() >= OWN_FIELDS:
            raise ValueError("not a line of an audit log")
        own = {name: found.pop(name) for name in OWN_FIELDS}
        return cls(**own, fields=found)

    def follows(self, place: Place) -> bool:
        """Whether this is, unchanged, the line after `place`."""
        try:
            again = Line.after(place, time=self.time, kind=self.kind, fields=self.fields)
        except ValueError:
            return False
        return again == self

    @property
    def place(self) -> Place:
        """Where a log ends that ends with this line."""
        return self.seq, self.hash

    def as_dict(self) -> dict[str, Value]:
        """All of it, as it is in the file."""
        return {**self.fields, **{name: getattr(self, name) for name in OWN_FIELDS}}

    def to_bytes(self) -> bytes:
        """The line as it is in the file, with its end."""
        return _canonical(self.as_dict()) + b"\n"


def signed_fields(head: AuditHead, signature: bytes, key: Ed25519PublicKey) -> dict[str, Value]:
    """Fields of a line about a counter-signed head."""
    return {
        "log": head.owner,
        "log_seq": head.seq,
        "log_hash": head.hash,
        "signature": base64.b64encode(signature).decode(),
        "key": base64.b64encode(key.public_bytes_raw()).decode(),
    }


def signed_head(line: Line, *, trusted: Ed25519PublicKey | None = None) -> AuditHead:
    """The head that such a line is about.

    Raises
    ------
    ValueError
        The line is not one, its signature is wrong, or `trusted` is another key.
    """
    try:
        seq = line.fields["log_seq"]
        if not isinstance(seq, int):
            raise ValueError("no counter-signature")
        head = AuditHead(str(line.fields["log"]), seq, str(line.fields["log_hash"]))
        raw = base64.b64decode(str(line.fields["key"]), validate=True)
        signature = base64.b64decode(str(line.fields["signature"]), validate=True)
        if trusted is not None and raw != trusted.public_bytes_raw():
            raise ValueError("signed by another key")
        Ed25519PublicKey.from_public_bytes(raw).verify(signature, head.signed_bytes())
    except (KeyError, TypeError, InvalidSignature) as exc:
        raise ValueError("no valid counter-signature") from exc
    return head


def _canonical(content: Mapping[str, Value]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


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
        self._head_path = path.with_name(path.name + ".head")
        self._mutex = threading.RLock()
        self._end: Place = START
        self._heads: list[Place] = [START]  # places where the head file may be
        self._since: list[Place] = [START]  # the newest line but counter-signatures, and those
        self._size = 0
        self._hashes = bytearray()  # of every line that was checked, in order
        with _disk_errors(path):
            self._prepare(create=owner is not None)
        with self._locked() as descriptor:
            if self._end == START:
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
            return AuditHead(self.owner, *self._end)

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
            return AuditHead(self.owner, *self._end)

    def witness(self, head: AuditHead, signature: bytes, key: Ed25519PublicKey) -> None:
        """Keep the other side's signature over a head of this log, as a line of it.

        Raises
        ------
        AuditLogDamaged
            The signature is wrong, or this log never had that head: then the other side remembers
            lines that are gone here.
        """
        try:
            key.verify(signature, head.signed_bytes())
        except InvalidSignature as exc:
            raise AuditLogDamaged("the counter-signature does not fit the head") from exc
        with self._locked() as descriptor:
            if head.owner != self.owner or head.hash != self._hash_of(head.seq):
                raise AuditLogDamaged(
                    f"{self.path}: line {head.seq}, which the other side counter-signed, is not there"
                )
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
        place, known = START, set[Place]()
        for line in self.lines():
            if not line.follows(place):
                raise self._broken(place)
            place = line.place
            known.add(place)
            if line.kind in {WITNESSED, COUNTER_SIGNED}:
                self._check_signed(line, known, trusted)
        return AuditHead(self.owner, *place)

    def _check_signed(
        self, line: Line, known: set[Place], trusted: Ed25519PublicKey | None
    ) -> None:
        own = line.kind == WITNESSED
        try:
            head = signed_head(line, trusted=trusted if own else None)
        except ValueError as exc:
            raise AuditLogDamaged(f"{self.path}: line {line.seq}: {exc}") from exc
        if own and (head.seq, head.hash) not in known:
            raise AuditLogDamaged(
                f"{self.path}: line {line.seq} witnesses a line that is not there"
            )

    # --- the file ---

    def _prepare(self, *, create: bool) -> None:
        has_log, has_head = self.path.exists(), self._head_path.exists()
        if not has_log and not has_head:
            if not create:
                raise AuditLogDamaged(
                    f"there is no audit log at {self.path}", remedy="Check the path of the log."
                )
            create_private_folder(self.path.parent)
            # The head comes first: a log without a head is then never the work of a crash.
            create_file(self._head_path, _head_bytes(START))
        elif not has_head:
            raise AuditLogDamaged(f"{self._head_path} is missing")
        if not self.path.exists():
            if self._read_head() != START:
                raise AuditLogDamaged(f"{self.path} is missing, and its head is not a new one's")
            create_file(self.path, b"")
        require_private(self.path)
        require_private(self._head_path)

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
            if not line.follows(self._end):
                raise self._broken(self._end)
            self._take(line, end)
        head = self._read_head()
        if head not in self._heads:
            raise AuditLogDamaged(
                f"{self.path} ends at line {self._end[0]} but its head file says line {head[0]}: "
                "one of the two was cut, edited or rolled back"
            )
        if self._size < size:  # the beginning of a line that a crash cut short
            self._cut(descriptor)
        if head not in self._since:
            self._settle(descriptor)

    def _settle(self, descriptor: int) -> None:
        """Bring the head up to the newest line."""
        if self._read_head() != self._end:
            os.fsync(descriptor)
            replace_file(self._head_path, _head_bytes(self._end))

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
        line = Line.after(self._end, time=now, kind=kind, fields=fields)
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
            replace_file(self._head_path, _head_bytes(self._end))

    def _take(self, line: Line, end: int) -> None:
        self._end, self._size = line.place, end
        if line.kind == WITNESSED:
            self._since.append(line.place)
            self._heads = self._since
        else:
            self._heads, self._since = [*self._since, line.place], [line.place]
        self._hashes += bytes.fromhex(line.hash)

    def _hash_of(self, seq: int) -> str:
        return self._hashes[32 * (seq - 1) : 32 * seq].hex() if seq > 0 else ""

    def _cut(self, descriptor: int) -> None:
        os.ftruncate(descriptor, self._size)
        os.fsync(descriptor)

    def _read_head(self) -> Place:
        try:
            found = json.loads(self._head_path.read_bytes())
            return int(found["seq"]), str(found["hash"])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise AuditLogDamaged(f"{self._head_path} is missing or not a head file") from exc

    def _broken(self, place: Place) -> AuditLogDamaged:
        return AuditLogDamaged(f"{self.path}: the hash chain is broken at line {place[0] + 1}")


def _head_bytes(place: Place) -> bytes:
    return json.dumps({"seq": place[0], "hash": place[1]}).encode() + b"\n"


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
    places, remembered = {line.place for line in lines}, set()
    signed = [line for line in other.lines() if line.kind == COUNTER_SIGNED]
    # A coordinator's log is witnessed by every site: only what `other` signs with is its business.
    keys = {line.fields.get("key") for line in signed}
    for line in signed:
        if line.fields.get("log") == log.owner:
            head = signed_head(line)
            if (head.seq, head.hash) not in places:
                raise AuditLogDamaged(
                    f"{other.path} counter-signed line {head.seq} of {log.owner!r}, "
                    f"and {log.path} does not have that line"
                )
            remembered.add((head.seq, head.hash))
    for line in lines:
        if line.kind == WITNESSED and line.fields.get("key") in keys:
            head = signed_head(line)
            if (head.seq, head.hash) not in remembered and head.seq <= _newest(remembered):
                raise AuditLogDamaged(
                    f"{other.path} lacks the counter-signature over line {head.seq} that "
                    f"{log.path} shows"
                )
    return len(remembered)


def _newest(places: Iterable[tuple[int, str]]) -> int:
    return max((seq for seq, _ in places), default=0)
