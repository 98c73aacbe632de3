"""Shamir's secret sharing over a prime field (Shamir, CACM 1979), for secrets of 32 bytes.

The field is that of the smallest prime above ``2**256``, so that a secret is one element and a share 33
bytes. Python's integers are not constant-time: a secret lives for one round, and who can time a site to
the microsecond is outside the threat model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from silotune.privacy.errors import MessageMalformed

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
_DRAWN_BYTES = 48  # of which the remainder is uniform to within 2**-127


def split(secret: bytes, *, threshold: int, points: Sequence[int], key: bytes) -> list[bytes]:
    """Shares of a secret at some points, any `threshold` of which give it back, and fewer nothing.

    Parameters
    ----------
    secret : bytes
        32 bytes.
    threshold : int
        From 1 to the number of points.
    points : sequence of int
        Distinct, from 1 to less than ``2**32``.
    key : bytes
        32 random bytes that give the polynomial, used for this secret only: who asks for the shares
        again, after a crash, gets the same ones.

    Returns
    -------
    list of bytes
        33 bytes a point.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(points):
        raise ValueError("a secret has 32 bytes, and a threshold is at most the number of shares")
    if len(set(points)) != len(points) or min(points) < 1 or max(points) >= 2**32:
        raise ValueError("points are distinct and positive")
    constant = int.from_bytes(secret, "big")
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    drawn = stream.update(bytes(_DRAWN_BYTES * (threshold - 1)))
    coefficients = [
        int.from_bytes(drawn[at : at + _DRAWN_BYTES], "big") % PRIME
        for at in range(0, len(drawn), _DRAWN_BYTES)
    ]
    return [_evaluate(coefficients, constant, x).to_bytes(SHARE_BYTES, "big") for x in points]


def _evaluate(coefficients: Sequence[int], constant: int, x: int) -> int:
    """Horner's rule; a point is small, so numbers may grow for a few steps before they are reduced."""
    value = 0
    for step, coefficient in enumerate(coefficients):
        value = value * x + coefficient
        if step & 15 == 15:
            value %= PRIME
    return (value * x + constant) % PRIME


class Interpolation:
    """Reconstruction from shares at fixed points: the weights serve any number of secrets.

    Parameters
    ----------
    points : sequence of int
        Where the shares are; as many as the threshold.
    """

    def __init__(self, points: Sequence[int]) -> None:
        self.points = tuple(points)
        self._weights = _weights_at_zero(self.points)

    def combine(self, shares: Mapping[int, bytes]) -> bytes:
        """The secret behind the shares at this object's points; others are not looked at.

        Raises
        ------
        MessageMalformed
            A share has another length or is no field element, or the result is not 32 bytes: the
            shares do not belong together.
        """
        total = 0
        for point, weight in zip(self.points, self._weights, strict=True):
            total += weight * element(shares[point])
        total %= PRIME
        if total >> 256:
            raise MessageMalformed("shares do not belong to one secret")
        return total.to_bytes(SECRET_BYTES, "big")


def element(share: bytes) -> int:
    """A share as a field element. Raises `MessageMalformed`."""
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise MessageMalformed("a share is not an element of the field")
    return value


def _weights_at_zero(points: Sequence[int]) -> list[int]:
    """Lagrange weights at 0, with one modular inversion for all (Montgomery's trick)."""
    above = 1
    for x in points:
        above = above * x % PRIME
    below = []
    for x in points:
        product = x  # the weight of x leaves x out of the numerator
        for other in points:
            if other != x:
                product = product * (other - x) % PRIME
        below.append(product)
    prefixes = [1]
    for value in below:
        prefixes.append(prefixes[-1] * value % PRIME)
    inverse, weights = pow(prefixes[-1], -1, PRIME), [0] * len(points)
    for place in reversed(range(len(points))):
        weights[place] = above * inverse % PRIME * prefixes[place] % PRIME
        inverse = inverse * below[place] % PRIME
    return weights
