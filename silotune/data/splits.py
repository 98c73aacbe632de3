"""The held-out split: a fixed, public function of one unit's (or group's) name.

Each key is hashed with SHA-256 to a point of [0, 1) and falls into test, validation or training by
the plan's shares. The point depends on the key alone: not on the plan, the site, the run, the order
of the rows, or on what other records there are. That has three consequences that any cleverer
split would lose:

- a unit is on the same side at every site and in every run, also after records were added;
- adding or removing one unit never moves another one, so a training set and its neighbour (in the
  sense of differential privacy) differ in that unit alone;
- a larger `test_share` keeps every unit of the smaller one in the test split.

The price is that shares hold only on average: with few keys of unequal size (a site with a dozen
large groups) the test split can be noticeably larger or smaller than asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

# Separates these hashes from any other use of SHA-256 on the same names. Changing it would move
# units that a model was trained on into the test split, so it never changes.
_DOMAIN = b"silotune split\0"


class Split(IntEnum):
    """The three parts of a dataset."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2


def fractions(keys: Sequence[str]) -> NDArray[np.float64]:
    """The point of [0, 1) of each key.

    Parameters
    ----------
    keys : sequence of str, length n
        Names of units or groups.

    Returns
    -------
    float64 array of shape [n]
        The first 64 bits of SHA-256 over the domain prefix and the key's UTF-8 bytes, read as a
        big-endian integer and divided by 2^64 (to the precision of a float, rounded down).
    """
    digests = b"".join(hashlib.sha256(_DOMAIN + key.encode()).digest()[:8] for key in keys)
    # Only 53 bits fit a float: dropping the others rounds down, and so never gives 1.0.
    return (np.frombuffer(digests, dtype=">u8") >> np.uint64(11)) / float(2**53)


def assign(keys: Sequence[str], *, test_share: float, validation_share: float) -> NDArray[np.uint8]:
    """The split of each key, as values of `Split`.

    Parameters
    ----------
    keys : sequence of str, length n
        Names of units or groups.
    test_share, validation_share : float
        Expected shares of keys; what is left is for training.

    Returns
    -------
    uint8 array of shape [n]
    """
    points = fractions(keys)
    split = np.full(len(keys), Split.TRAIN, dtype=np.uint8)
    split[points < test_share + validation_share] = Split.VALIDATION
    split[points < test_share] = Split.TEST
    return split
