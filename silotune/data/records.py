"""A site's checked records in memory, addressed by row and by privacy unit.

The held-out split: a fixed, secret function of one unit's (or group's) name.

Each key is hashed with HMAC-SHA256 under a salt of the site to a point of [0, 1) and falls into test,
validation or training by the plan's shares. The point depends on salt and key alone: not on the plan,
the run, the order of the rows, or on what other records there are. That has three consequences that
any cleverer split would lose:

- a unit is on the same side in every run of its site, also after records were added;
- adding or removing one unit never moves another one, so a training set and its neighbour (in the
  sense of differential privacy) differ in that unit alone;
- a larger `test_share` keeps every unit of the smaller one in the test split.

Without the salt everybody could compute a person's side from the name alone, and a plan's shares
would be a question about it. There are two prices. A person with records at two sites may be on one
side here and on the other there, so held-out scores of such people are too good. And shares hold
only on average: with few keys of unequal size (a site with a dozen large groups) the test split can
be noticeably larger or smaller than asked.

A site's own secret: what decides the side of the split, and names the content of records.

It is made once, sealed in the state folder, and never changes: with another one, units that a model was
trained on would become test units.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from silotune.data.sources import LeftOut
from silotune.trust.files import create_file, create_private_folder
from silotune.trust.vault import Vault

# Separates these hashes from any other use of the same secret. Changing it would move units that a
# model was trained on into the test split, so it never changes.
_DOMAIN = b"silotune split 2\0"


class Split(IntEnum):
    """The three parts of a dataset."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2


def salt_for(*, seed: int | None, site: str, secret: bytes) -> bytes:
    """The salt of a site's split.

    Parameters
    ----------
    seed : int or None
        Of the plan. A seeded run is repeatable anywhere and not private: its salt follows the seed.
    site : str
        The site's name.
    secret : bytes
        The site's own, which never changes (`silotune.data.records`).
    """
    key = secret if seed is None else f"seed {seed}".encode()
    return hmac.digest(key, _DOMAIN + site.encode(), hashlib.sha256)


def fractions(keys: Sequence[str], *, salt: bytes) -> NDArray[np.float64]:
    """The point of [0, 1) of each key.

    Parameters
    ----------
    keys : sequence of str, length n
        Names of units or groups.
    salt : bytes
        From `salt_for`.

    Returns
    -------
    float64 array of shape [n]
        The first 64 bits of HMAC-SHA256 under the salt over the key's UTF-8 bytes, read as a
        big-endian integer and divided by 2^64 (to the precision of a float, rounded down).
    """
    digests = b"".join(hmac.digest(salt, key.encode(), hashlib.sha256)[:8] for key in keys)
    # Only 53 bits fit a float: dropping the others rounds down, and so never gives 1.0.
    return (np.frombuffer(digests, dtype=">u8") >> np.uint64(11)) / float(2**53)


def assign(
    keys: Sequence[str], *, test_share: float, validation_share: float, salt: bytes
) -> NDArray[np.uint8]:
    """The split of each key, as values of `Split`.

    Parameters
    ----------
    keys : sequence of str, length n
        Names of units or groups.
    test_share, validation_share : float
        Expected shares of keys; what is left is for training.
    salt : bytes
        From `salt_for`.

    Returns
    -------
    uint8 array of shape [n]
    """
    points = fractions(keys, salt=salt)
    split = np.full(len(keys), Split.TRAIN, dtype=np.uint8)
    split[points < test_share + validation_share] = Split.VALIDATION
    split[points < test_share] = Split.TEST
    return split


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


SECRET_FILE = "split.secret.sealed"  # noqa: S105 - a file's name
"""Its name in the state folder."""

_BYTES = 32


def own_secret(state: Path, vault: Vault, *, new: bytes | None = None) -> bytes:
    """The secret in a state folder, made (or taken from `new`) if there is none yet.

    Raises
    ------
    SealBroken, FileExposed
        The file was changed, or other accounts of the machine may read it.
    """
    path = state / SECRET_FILE
    if not path.exists():
        create_private_folder(state)
        create_file(path, vault.seal(new or os.urandom(_BYTES), name=path.name))
    return vault.read(path)
