"""Masks: the keystream of AES-256 in counter mode (NIST SP 800-38A), added in the ring of the vector.

Every mask has a key of its own (HKDF over an X25519 agreement of this round's keys, or a fresh seed), so
the counter starts at zero each time. All masks of a block are added while it is in the cache: the vector
is read from memory once, whatever the number of peers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Ring = NDArray[np.uint32] | NDArray[np.uint16]

_BLOCK_BYTES = 1 << 17  # keystream and vector block together stay in a second-level cache
_AES_BLOCK = 16
_ZEROS = memoryview(bytes(_BLOCK_BYTES))


@dataclass(frozen=True)
class Mask:
    """A keystream to be added to a vector, or taken from it.

    Attributes
    ----------
    key : bytes
        32 bytes, used for this mask only.
    plus : bool
        Whether it is added.
    """

    key: bytes
    plus: bool

    def inverse(self) -> Mask:
        """What undoes this mask."""
        return Mask(self.key, not self.plus)


def apply_masks(vector: Ring, masks: Sequence[Mask]) -> None:
    """Add masks to a vector, in place, modulo ``2**32`` or ``2**16`` as its type says.

    Parameters
    ----------
    vector : uint32 or uint16 array
        One-dimensional and contiguous.
    masks : sequence of Mask
        Any number.
    """
    if vector.dtype not in (np.uint32, np.uint16) or vector.ndim != 1:
        raise ValueError("masks are added to a flat vector of uint32 or uint16")
    if not vector.flags.c_contiguous or not vector.flags.writeable:
        raise ValueError("masks are added in place")
    streams = [
        (
            Cipher(algorithms.AES(mask.key), modes.CTR(bytes(_AES_BLOCK))).encryptor(),
            np.add if mask.plus else np.subtract,
        )
        for mask in masks
    ]
    buffer = bytearray(_BLOCK_BYTES + _AES_BLOCK)
    little = vector.dtype.newbyteorder("<")
    keystream: NDArray[Any] = np.frombuffer(buffer, little, _BLOCK_BYTES // vector.itemsize)
    for start in range(0, vector.size, len(keystream)):
        block = vector[start : start + len(keystream)]
        zeros = _ZEROS[: block.nbytes]
        part = keystream[: block.size]
        for stream, combine in streams:
            stream.update_into(zeros, buffer)
            combine(block, part, out=block)
