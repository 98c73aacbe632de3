"""What the ledger's table holds: entries, and their places in the hash chain."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_WITNESS_CONTEXT = b"silotune ledger head v1\0"


@dataclass(frozen=True)
class Entry:
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
class Head:
    """The end of a chain: how many rows, and the hash of the last."""

    seq: int
    hash: str

    def signed_bytes(self) -> bytes:
        """What a counter-signature covers."""
        return _WITNESS_CONTEXT + f"{self.seq} {self.hash}".encode()

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """Counter-sign this head (Ed25519, RFC 8032), as the coordinator does."""
        return key.sign(self.signed_bytes())


@dataclass(frozen=True)
class Row:
    """A row of the table: an entry in its place."""

    seq: int
    previous: str
    entry: Entry
    hash: str

    @classmethod
    def after(cls, head: Head, entry: Entry) -> Row:
        """The row that appends `entry` to a chain that ends at `head`."""
        seq = head.seq + 1
        return cls(seq, head.hash, entry, _row_hash(seq, head.hash, entry))

    @property
    def head(self) -> Head:
        """The head of a chain that ends with this row."""
        return Head(self.seq, self.hash)

    def as_dict(self) -> dict[str, str | int | None]:
        """Plain columns, in the order of the table."""
        return {
            "seq": self.seq,
            "previous": self.previous,
            **vars(self.entry),
            "hash": self.hash,
        }


GENESIS = Head(0, "0" * 64)


def _row_hash(seq: int, previous: str, entry: Entry) -> str:
    columns = {"seq": seq, "previous": previous, **vars(entry)}
    canonical = json.dumps(columns, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
