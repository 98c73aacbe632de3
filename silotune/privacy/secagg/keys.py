"""Keys of a round: X25519 agreements, what is derived from them, sealed shares.

A site makes two X25519 pairs (RFC 7748) and a seed for every round. The first pair agrees on pairwise
masks and is rebuilt by the others if the site drops out; the second seals shares and is never shared, so
that rebuilding the first opens nothing. Keys are derived by HKDF-SHA256 (RFC 5869), bound to the round's
context and to the pair; shares are sealed by ChaCha20-Poly1305 (RFC 8439) under a key that seals one
message in each direction.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from silotune.privacy.errors import MessageMalformed, TranscriptMismatch
from silotune.privacy.secagg.masks import Mask

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
