"""The held-out split: a fixed, secret function of one unit's (or group's) name.

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
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

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
        The site's own, which never changes (`silotune.client.secret`).
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
