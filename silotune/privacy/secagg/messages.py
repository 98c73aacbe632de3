"""What travels in secure aggregation, as bytes, and who takes part: a site's identity and limits.

Contents are length-prefixed parts; each has one form.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.privacy.errors import KeyReused, MessageMalformed, SignerUnknown
from silotune.privacy.secagg.keys import PUBLIC_BYTES, digest
from silotune.trust.signed import fits

SIGNATURE_BYTES = 64
_MOST_PARTS = 1 << 16


def pack(parts: Iterable[bytes]) -> bytes:
    """Parts, each behind its length."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def unpack(blob: bytes, *, count: int | None = None) -> list[bytes]:
    """Read what `pack` wrote.

    Raises
    ------
    MessageMalformed
        Cut short, too long, or not `count` parts.
    """
    parts, at = list[bytes](), 0
    while at < len(blob):
        if at + 4 > len(blob) or len(parts) >= _MOST_PARTS:
            raise MessageMalformed("a list in a message is cut short or endless")
        (length,) = struct.unpack_from("<I", blob, at)
        at += 4
        if length > len(blob) - at:
            raise MessageMalformed("a part of a message is cut short")
        parts.append(blob[at : at + length])
        at += length
    if count is not None and len(parts) != count:
        raise MessageMalformed(f"a message has {len(parts)} parts, not {count}")
    return parts


def pack_named(parts: Mapping[str, bytes]) -> bytes:
    """Byte strings by site, in the order of the names."""
    return pack(x for name in sorted(parts) for x in (name.encode(), parts[name]))


def unpack_named(blob: bytes) -> dict[str, bytes]:
    """Read what `pack_named` wrote. Raises `MessageMalformed`, also if a name comes twice."""
    parts = unpack(blob)
    found = {text(name): part for name, part in zip(parts[::2], parts[1::2], strict=False)}
    if 2 * len(found) != len(parts):
        raise MessageMalformed("a site is listed twice, or without its part")
    return found


def text(raw: bytes) -> str:
    """A site's name. Raises `MessageMalformed`."""
    try:
        name = raw.decode("ascii")
    except UnicodeDecodeError as exc:
        raise MessageMalformed("a site's name is not plain text") from exc
    if not 1 <= len(name) <= 63:
        raise MessageMalformed("a site's name has 1 to 63 characters")
    return name


def round_context(*, plan_sha256: str, run: str, number: int, roster: Mapping[str, bytes]) -> bytes:
    """What every key, signature and sealed share of a round is bound to: 32 bytes.

    Parameters
    ----------
    roster : mapping of site to bytes
        Raw Ed25519 public keys of all enrolled sites.
    """
    members = digest(*(x for name in sorted(roster) for x in (name.encode(), roster[name])))
    return digest(
        b"silotune secure aggregation 1",
        plan_sha256.encode(),
        run.encode(),
        str(number).encode(),
        members,
    )


@dataclass(frozen=True, kw_only=True)
class Advertisement:
    """A site's public keys of one round, signed by its identity.

    Attributes
    ----------
    site : str
    context : bytes
        See `round_context`.
    mask_public, share_public : bytes
        X25519, 32 bytes each.
    commitment : bytes
        To the seed of the site's own mask.
    declared_units : int
        Public size of the site, which weights may use.
    signature : bytes
        Ed25519 over all of it.
    """

    site: str
    context: bytes
    mask_public: bytes
    share_public: bytes
    commitment: bytes
    declared_units: int
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        """What the signature covers."""
        return digest(b"advertisement", *self._parts())

    def _parts(self) -> list[bytes]:
        return [
            self.site.encode(),
            self.context,
            self.mask_public,
            self.share_public,
            self.commitment,
            struct.pack("<Q", self.declared_units),
        ]

    def to_bytes(self) -> bytes:
        """For the wire."""
        return pack([*self._parts(), self.signature])

    @classmethod
    def from_bytes(cls, blob: bytes) -> Advertisement:
        """Read what `to_bytes` wrote; nothing is verified but lengths. Raises `MessageMalformed`."""
        site, context, mask, share, committed, units, signature = unpack(blob, count=7)
        lengths = [len(x) for x in (context, mask, share, committed, units, signature)]
        if lengths != [32, PUBLIC_BYTES, PUBLIC_BYTES, 32, 8, SIGNATURE_BYTES]:
            raise MessageMalformed("a key of an advertisement has a wrong length")
        return cls(
            site=text(site),
            context=context,
            mask_public=mask,
            share_public=share,
            commitment=committed,
            declared_units=struct.unpack("<Q", units)[0],
            signature=signature,
        )

    def require_signed(self, roster: Mapping[str, bytes]) -> None:
        """Raise `SignerUnknown` unless the site is enrolled and signed this."""
        require_signature(self.site, self.signature, self.signed_bytes(), roster)


@dataclass(frozen=True)
class Cohort:
    """The members of a round: who advertised keys, in the order of names.

    Parameters
    ----------
    members : sequence of Advertisement
        Sorted by site.
    """

    members: Sequence[Advertisement]
    places: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        names = [member.site for member in self.members]
        if names != sorted(set(names)):
            raise MessageMalformed("the members are not in the order of their names, each once")
        object.__setattr__(self, "places", {name: i for i, name in enumerate(names)})

    @classmethod
    @lru_cache(maxsize=2)  # looked at twice a round, and by every site that one process plays
    def from_bytes(cls, blob: bytes) -> Cohort:
        """Read what `to_bytes` wrote. Raises `MessageMalformed`."""
        return cls(tuple(Advertisement.from_bytes(part) for part in unpack(blob)))

    def to_bytes(self) -> bytes:
        """For the wire."""
        return pack(member.to_bytes() for member in self.members)

    @cached_property
    def digest(self) -> bytes:
        """Identifies the cohort with all its keys: 32 bytes."""
        return digest(b"cohort", *(member.to_bytes() for member in self.members))

    @property
    def keys(self) -> frozenset[bytes]:
        """All public keys of the members."""
        return frozenset(k for m in self.members for k in (m.mask_public, m.share_public))

    @property
    def names(self) -> list[str]:
        """The members' names, sorted."""
        return [member.site for member in self.members]

    def __getitem__(self, site: str) -> Advertisement:
        return self.members[self.places[site]]

    def __contains__(self, site: object) -> bool:
        return site in self.places

    def __len__(self) -> int:
        return len(self.members)

    def require_sound(
        self, *, context: bytes, roster: Mapping[str, bytes], seen: frozenset[bytes] = frozenset()
    ) -> None:
        """Check every member: its context, its signature, and that no key came before.

        Parameters
        ----------
        seen : frozenset of bytes
            Keys of the round before.

        Raises
        ------
        SignerUnknown, KeyReused
        """
        for member in self.members:
            if member.context != context:
                raise SignerUnknown(f"{member.site} signed for another plan, run or round")
            member.require_signed(roster)
        if len(self.keys) != 2 * len(self) or self.keys & seen:
            raise KeyReused("a public key was used twice")


def require_signature(
    site: str, signature: bytes, message: bytes, roster: Mapping[str, bytes]
) -> None:
    """Raise `SignerUnknown` unless the enrolled site signed the message."""
    known = roster.get(site)
    if known is None:
        raise SignerUnknown(f"no site {site!r} is enrolled")
    if not _fits(signature, message, known):
        raise SignerUnknown(f"this is not signed by {site}")


# What fits once fits for every site that one process plays.
_fits = lru_cache(maxsize=1 << 12)(fits)


def signed(advertisement: Advertisement, identity: Ed25519PrivateKey) -> Advertisement:
    """The advertisement with its signature."""
    plain = {**vars(advertisement), "signature": identity.sign(advertisement.signed_bytes())}
    return Advertisement(**plain)


def pack_names(names: Iterable[str]) -> bytes:
    """Names of sites, sorted."""
    return pack(name.encode() for name in sorted(names))


def unpack_names(blob: bytes) -> list[str]:
    """Read what `pack_names` wrote; twice the same name is kept, for the caller to refuse."""
    return [text(part) for part in unpack(blob)]


@dataclass(frozen=True, kw_only=True)
class Member:
    """A site as a member of a run's cohorts.

    Attributes
    ----------
    site : str
    identity : Ed25519PrivateKey
        What it was enrolled with.
    roster : mapping of site to bytes
        Raw Ed25519 public keys of all enrolled sites, from enrolment and never from a round.
    plan_sha256, run : str
    declared_units : int
        Public size.
    threshold : int or None
        The plan's; more than two thirds of a cohort when None.
    largest_cohort : int
        The plan's: what the encoding has room for.
    smallest_cohort : int
        The site's own minimum of members that share their secrets.
    smallest_sum : int
        The site's own floor under the plan's threshold: survivors that the sum must be over.
    """

    site: str
    identity: Ed25519PrivateKey = field(repr=False)
    roster: Mapping[str, bytes]
    plan_sha256: str
    run: str
    declared_units: int
    threshold: int | None = None
    largest_cohort: int = 1 << 10
    smallest_cohort: int = 3
    smallest_sum: int = 2

    def context(self, number: int) -> bytes:
        """See `silotune.privacy.secagg.messages.round_context`."""
        return round_context(
            plan_sha256=self.plan_sha256, run=self.run, number=number, roster=self.roster
        )
