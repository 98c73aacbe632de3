"""The roster: the sites of a federation and their keys, signed, numbered and chained.

Every change makes a new version that names the SHA-256 of the one before, so that a site that has
seen version n accepts only its successors: the coordinator can neither show two sites different
histories without two chains that disagree, nor bring a revoked site back quietly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, model_validator

from silotune.plan.document import Document, Sha256, text_sha256
from silotune.plan.sections import Name
from silotune.trust.errors import RosterInvalid
from silotune.trust.identity import six_words
from silotune.trust.signed import KeyText, SignatureText, SignedText, Signing

_ROSTER = Signing("silotune roster v1", "roster", RosterInvalid)

Pem = Annotated[str, Field(max_length=8192, pattern=r"^-----BEGIN [A-Z ]+-----\n")]


class RosterEntry(Document):
    """One site.

    Attributes
    ----------
    name : str
        Its name in this federation, for ever.
    signing_key : str
        Ed25519 public key, base64.
    node_key : str
        P-384 public key, PEM.
    certificate : str
        SHA-256 of its current certificate.
    status : str
        ``active``, or ``revoked``: it may connect no more, and nothing it signs counts.
    """

    name: Name
    signing_key: KeyText
    node_key: Pem
    certificate: Sha256
    status: Literal["active", "revoked"] = "active"

    @property
    def words(self) -> str:
        """The six words that people compare."""
        return six_words(name=self.name, signing_key=self.signing_key, node_key=self.node_key)


class Roster(Document):
    """One version of the list."""

    federation: Name
    version: Annotated[int, Field(ge=1)]
    previous: Sha256 | Literal[""]
    issued_at: Annotated[int, Field(ge=0)]
    members: tuple[RosterEntry, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [member.name for member in self.members]
        if names != sorted(set(names)):
            raise ValueError("members are not sorted by name, or one is listed twice")
        if (self.version == 1) != (self.previous == ""):
            raise ValueError("the first version, and only it, has no predecessor")
        return self

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical text, in hex."""
        return text_sha256(self.canonical())

    @property
    def active(self) -> dict[str, RosterEntry]:
        """Members that may take part, by name."""
        return {m.name: m for m in self.members if m.status == "active"}

    def successor(self, *, members: Sequence[RosterEntry], issued_at: int) -> Roster:
        """The next version."""
        return Roster(
            federation=self.federation,
            version=self.version + 1,
            previous=self.sha256,
            issued_at=issued_at,
            members=tuple(sorted(members, key=lambda m: m.name)),
        )


class SignedRoster(Document):
    """A roster's canonical text and the federation key's signature over it."""

    roster: SignedText
    signature: SignatureText

    @classmethod
    def sign(cls, roster: Roster, key: Ed25519PrivateKey) -> Self:
        """Sign the canonical text."""
        return cls(**_ROSTER.sign_text(roster, key))

    def verify(self, trusted: Ed25519PublicKey) -> Roster:
        """The roster, if `trusted` signed it. Raises `RosterInvalid`."""
        return _ROSTER.read_text(Roster, self.roster, self.signature, trusted=trusted)


def follow(
    seen: Roster | None, versions: Sequence[SignedRoster], *, trusted: Ed25519PublicKey
) -> Roster | None:
    """Go from the newest roster seen to a newer one, over every version between them.

    Parameters
    ----------
    seen : Roster or None
        The newest one that this side accepted; None for a newcomer, who takes the first offered as
        its start.
    versions : sequence of SignedRoster
        What the other side offers, oldest first; versions up to the seen one must agree with it.
    trusted : Ed25519PublicKey
        The federation's key.

    Returns
    -------
    Roster or None
        The newest, which is `seen` if there is nothing newer.

    Raises
    ------
    RosterInvalid
        A signature is wrong, a version is missing, or history was changed.
    """
    newest = seen
    for signed in versions:
        offered = signed.verify(trusted)
        if newest is None or (offered.version == newest.version and offered == newest):
            newest = offered
        elif offered.federation != newest.federation:
            raise RosterInvalid("the roster is of another federation")
        elif offered.version != newest.version + 1:
            raise RosterInvalid(
                f"roster version {offered.version} was offered after version {newest.version}"
            )
        elif offered.previous != newest.sha256:
            raise RosterInvalid(f"roster version {offered.version} continues another history")
        else:
            newest = offered
    return newest
