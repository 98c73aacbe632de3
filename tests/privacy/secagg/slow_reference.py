"""Secure aggregation once more, slowly: Python integers, written from the papers and RFCs.

Nothing of silotune's protocol code is used: X25519 is RFC 7748's ladder, HKDF RFC 5869 over ``hmac``,
counter mode is made of single AES blocks (NIST SP 800-38A), Shamir reconstruction is Lagrange's formula
with an inversion a term. A round is checked from the outside: from the sites' secrets it predicts each
masked vector, and from what the coordinator received it computes the sum.
"""

import hashlib
import hmac
import struct
from functools import lru_cache

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

P25519 = 2**255 - 19
FIELD = 2**256 + 297


def x25519(scalar: bytes, point: bytes) -> bytes:
    k = int.from_bytes(scalar, "little")
    k = (k & ~7 & ~(1 << 255)) | (1 << 254)
    x1 = int.from_bytes(point, "little") & ((1 << 255) - 1)
    x2, z2, x3, z3, swap = 1, 0, x1, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % P25519, b * b % P25519, d * a % P25519, c * b % P25519
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % P25519, x1 * (da - cb) ** 2 % P25519
        x2, z2 = aa * bb % P25519, e * (aa + 121665 * e) % P25519
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P25519 - 2, P25519) % P25519).to_bytes(32, "little")


_AGREED: dict[frozenset[bytes], bytes] = {}


def agreed(scalar: bytes, point: bytes) -> bytes:
    """The ladder, climbed once for both ends of a pair."""
    pair = frozenset({public(scalar), point})
    if pair not in _AGREED:
        _AGREED[pair] = x25519(scalar, point)
    return _AGREED[pair]


@lru_cache(maxsize=64)
def public(scalar: bytes) -> bytes:
    return x25519(scalar, (9).to_bytes(32, "little"))


def joined_digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(struct.pack("<Q", len(p)) + p for p in parts)).digest()


def hkdf(secret: bytes, info: bytes) -> bytes:
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def keystream(key: bytes, size: int) -> bytes:
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    counters = (i.to_bytes(16, "big") for i in range(-(-size // 16)))
    return b"".join(block.update(counter) for counter in counters)[:size]


def numbers(key: bytes, size: int, width: int) -> list[int]:
    stream = keystream(key, size * width)
    return [int.from_bytes(stream[i : i + width], "little") for i in range(0, len(stream), width)]


def pair_key(private: bytes, peer: bytes, context: bytes, one: str, other: str) -> bytes:
    low, high = sorted((one, other))
    info = joined_digest(b"silotune secagg", b"mask", context, f"{low}\0{high}".encode())
    return hkdf(agreed(private, peer), info)


def own_key(seed: bytes, context: bytes, site: str) -> bytes:
    return hmac.new(seed, joined_digest(b"self", context, site.encode()), hashlib.sha256).digest()


def masked_vector(vector, *, site, present, secrets, publics, context, width):
    """Equation of section 4 of Bonawitz et al.: x + PRG(b) + sum over v > u - sum over v < u."""
    modulus = 256**width
    total = [int(x) for x in vector]
    seed, private = secrets
    streams = [(numbers(own_key(seed, context, site), len(total), width), 1)]
    for peer in present:
        if peer != site:
            key = pair_key(private, publics[peer], context, site, peer)
            streams.append((numbers(key, len(total), width), 1 if site < peer else -1))
    return [
        (x + sum(sign * stream[i] for stream, sign in streams)) % modulus
        for i, x in enumerate(total)
    ]


def reconstruct(shares: dict[int, bytes]) -> bytes:
    secret = 0
    for xi, share in shares.items():
        term = int.from_bytes(share, "big")
        for xj in shares:
            if xj != xi:
                term = term * xj * pow(xj - xi, -1, FIELD) % FIELD
        secret += term
    return (secret % FIELD).to_bytes(32, "big")


def coordinator_sum(*, masked, opened, names, present, publics, context, threshold, width):
    """The survivors' sum, from what a coordinator holds after the last phase."""
    modulus = 256**width
    size = len(next(iter(masked.values())))
    total = [sum(int(v[i]) for v in masked.values()) % modulus for i in range(size)]
    for name in present:
        shares = {names.index(u) + 1: given[name] for u, given in opened.items() if name in given}
        secret = reconstruct(dict(sorted(shares.items(), reverse=True)[:threshold]))
        if name in masked:
            streams = [(numbers(own_key(secret, context, name), size, width), -1)]
        else:
            assert public(secret) == publics[name]
            streams = [
                (
                    numbers(pair_key(secret, publics[peer], context, name, peer), size, width),
                    # What survivor `peer` added for `name` is taken off, and the reverse.
                    -1 if peer < name else 1,
                )
                for peer in masked
            ]
        for stream, sign in streams:
            total = [(x + sign * s) % modulus for x, s in zip(total, stream, strict=True)]
    return total
