"""What an audit log holds: lines, their places in the hash chain, and heads to be counter-signed."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

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
