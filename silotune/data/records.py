"""A site's checked records in memory, addressed by row and by privacy unit."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from silotune.data.faults import LeftOut
from silotune.data.splits import Split

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Records:
    """The records that a plan's task sees.

    Attributes
    ----------
    examples : sequence of mapping, length n
        Strings by role: ``text`` and ``label``, or ``prompt`` and ``response``.
    unit_of : int64 array of shape [n]
        The privacy unit of each record: every one of 0 .. `n_units()` - 1 occurs.
    split : uint8 array of shape [n]
        The part each record belongs to, as values of `Split`. All records of a unit are in one.
    left_out : tuple of LeftOut
        What of the source is not among them, and why: private.
    content : str
        SHA-256, in hex, of what was read of the records: the key of anything that is made of them.
        Whoever knows all records but one could test that one on it: it never leaves the process;
        `fingerprint` may be written down.
    """

    examples: Sequence[Mapping[str, str]]
    unit_of: NDArray[np.int64]
    split: NDArray[np.uint8]
    left_out: tuple[LeftOut, ...] = ()
    content: str = ""

    def __post_init__(self) -> None:
        if not len(self.examples) == len(self.unit_of) == len(self.split):
            raise ValueError("examples, unit_of and split must have one length")
        if self.unit_of.size and not np.bincount(self.unit_of).all():
            raise ValueError("units must be numbered without gaps")
        if (self._unit_split[self.unit_of] != self.split).any():
            raise ValueError("a unit is on both sides of the split")
        self.unit_of.setflags(write=False)
        self.split.setflags(write=False)

    def __len__(self) -> int:
        """Number of records."""
        return len(self.examples)

    def fingerprint(self, secret: bytes) -> str:
        """A name of exactly this content that only who has the site's secret can compute, in hex."""
        return hmac.digest(secret, b"silotune records\0" + self.content.encode(), sha256).hex()

    @property
    def rows_left_out(self) -> int:
        """How many rows of the source were left out."""
        return sum(len(part.rows) for part in self.left_out)

    def n_units(self, split: Split | None = None) -> int:
        """Number of units, of one split or of all. A private number: it must not leave the site."""
        if split is None:
            return len(self._unit_split)
        return int(np.count_nonzero(self._unit_split == split))

    def units(self, split: Split) -> Rows:
        """The units of a split, ascending."""
        return np.flatnonzero(self._unit_split == split)

    def rows(self, split: Split) -> Rows:
        """The rows of a split, ascending."""
        return np.flatnonzero(self.split == split)

    @cached_property
    def _unit_split(self) -> NDArray[np.uint8]:
        n_units = int(self.unit_of.max()) + 1 if len(self.unit_of) else 0
        split = np.zeros(n_units, dtype=np.uint8)
        split[self.unit_of] = self.split
        return split
