"""Keys of a round: X25519 agreements, what is derived from them, secrets in sealed shares.

A site makes two X25519 pairs (RFC 7748) and a seed for every round. The first pair agrees on pairwise
masks and is rebuilt by the others if the site drops out; the second seals shares and is never shared, so
that rebuilding the first opens nothing. Keys are derived by HKDF-SHA256 (RFC 5869), bound to the round's
context and to the pair; shares are sealed by ChaCha20-Poly1305 (RFC 8439) under a key that seals one
message in each direction.

Secrets of 32 bytes are shared over a prime field (Shamir, CACM 1979). The field is that of the smallest
prime above ``2**256``, so that a secret is one element and a share 33 bytes. Python's integers are not
constant-time: a secret lives for one round, and who can time a site to the microsecond is outside the
threat model.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from silotune.privacy.errors import MessageMalformed, TranscriptMismatch
from silotune.privacy.secagg.encoding import Mask

PUBLIC_BYTES = 32
_NONCE = bytes(12)


@dataclass(frozen=True)
class RoundSecrets:
    """What a site must not show, 32 bytes each.

    Attributes
    ----------
    mask_key, share_key : bytes
        Private X25519 keys.
    seed : bytes
        Of the site's own mask.
    polynomials : bytes
        Key of the polynomials that share the mask key and the seed.
    """

    mask_key: bytes
    share_key: bytes
    seed: bytes
    polynomials: bytes

    @classmethod
    def fresh(cls) -> RoundSecrets:
        """New ones, from the operating system's generator."""
        return cls(*(os.urandom(32) for _ in range(4)))

    @cached_property
    def masking(self) -> X25519PrivateKey:
        """The private key that agrees on masks."""
        return X25519PrivateKey.from_private_bytes(self.mask_key)

    @cached_property
    def sharing(self) -> X25519PrivateKey:
        """The private key that seals shares."""
        return X25519PrivateKey.from_private_bytes(self.share_key)


def digest(*parts: bytes) -> bytes:
    """SHA-256 over parts with their lengths: no two lists of parts are confused."""
    found = hashlib.sha256()
    for part in parts:
        found.update(struct.pack("<Q", len(part)))
        found.update(part)
    return found.digest()


def commitment(context: bytes, site: str, seed: bytes) -> bytes:
    """Binds a site to its seed without telling it, so that a wrong reconstruction is noticed."""
    return digest(b"seed", context, site.encode(), seed)


def agree(
    private: X25519PrivateKey, public: bytes, *, purpose: bytes, context: bytes, pair: str
) -> bytes:
    """A 32-byte key that two sites share, for one purpose in one round.

    Raises
    ------
    MessageMalformed
        The public key is of low order: the secret would be known to everybody.
    """
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as exc:
        raise MessageMalformed("a public key can't be agreed with") from exc
    info = digest(b"silotune secagg", purpose, context, pair.encode())
    return HKDF(hashes.SHA256(), 32, None, info).derive(secret)


def pairwise_mask(
    private: X25519PrivateKey, public: bytes, *, context: bytes, own: str, peer: str
) -> Mask:
    """The mask between two sites: the one whose name sorts first adds it, the other takes it away."""
    low, high = sorted((own, peer))
    key = agree(private, public, purpose=b"mask", context=context, pair=f"{low}\0{high}")
    return Mask(key, own == low)


def self_mask(seed: bytes, *, context: bytes, site: str) -> Mask:
    """The mask that a site adds on its own and that is removed when it survives."""
    key = hmac.digest(seed, digest(b"self", context, site.encode()), "sha256")
    return Mask(key, True)


def seal(
    private: X25519PrivateKey, public: bytes, plain: bytes, *, bound: bytes, own: str, peer: str
) -> bytes:
    """Encrypt a message of a round to one peer.

    Parameters
    ----------
    bound : bytes
        Digest of all that both must have seen alike; another one fails to open.
    """
    # The direction is in the derivation: each key seals one message, so the nonce may be constant.
    key = agree(private, public, purpose=b"share", context=bound, pair=f"{own}\0{peer}")
    return ChaCha20Poly1305(key).encrypt(_NONCE, plain, bound)


def open_sealed(
    private: X25519PrivateKey, public: bytes, sealed: bytes, *, bound: bytes, own: str, peer: str
) -> bytes:
    """Decrypt what `peer` sealed to `own`.

    Raises
    ------
    TranscriptMismatch
        It was sealed by somebody else, to somebody else, or in another round or cohort.
    """
    key = agree(private, public, purpose=b"share", context=bound, pair=f"{peer}\0{own}")
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, bound)
    except InvalidTag as exc:
        raise TranscriptMismatch(f"the shares of {peer} do not open: it saw another round") from exc


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
