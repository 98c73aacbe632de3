"""The invitation: one short line that carries trust from the operator to a new site.

It says where the coordinator is and which authority's certificate to expect there, so that the site
trusts the right one from the first byte, and holds a secret that lets the site ask to be enrolled,
once. It is sent by a channel that the two people trust; the operator still compares six words.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from silotune.trust.errors import InviteInvalid

_PREFIX = "silotune1-"
_SECRET_BYTES, _FINGERPRINT_BYTES, _CHECK_BYTES = 16, 20, 3
_MOST_CHARACTERS = 400


@dataclass(frozen=True, kw_only=True)
class Invite:
    """What an invitation code says.

    Attributes
    ----------
    url : str
        ``https://host:port`` of the coordinator.
    authority : str
        First 160 bits of the SHA-256 over the authority's certificate (DER), in hex.
    expires : int
        Unix time after which the coordinator refuses it.
    secret : str
        128 random bits, in hex; the coordinator keeps only `secret_digest` of it.
    """

    url: str
    authority: str
    expires: int
    secret: str

    @classmethod
    def new(cls, *, url: str, authority_fingerprint: str, lifetime: float) -> Self:
        """An invitation with a fresh secret, valid for `lifetime` seconds from now."""
        return cls(
            url=_checked_url(url),
            authority=authority_fingerprint[: 2 * _FINGERPRINT_BYTES],
            expires=int(time.time() + lifetime),
            secret=secrets.token_hex(_SECRET_BYTES),
        )

    def encode(self) -> str:
        """The code: printable, one word, with a checksum against typing errors."""
        content = (
            self.expires.to_bytes(5, "big")
            + bytes.fromhex(self.secret)
            + bytes.fromhex(self.authority)
            + self.url.encode()
        )
        packed = base64.urlsafe_b64encode(content + _check(content)).rstrip(b"=")
        return _PREFIX + packed.decode()

    @classmethod
    def decode(cls, code: str) -> Self:
        """Read a code.

        Raises
        ------
        InviteInvalid
            It is no invitation, or was typed wrongly. Expiry is the coordinator's to judge: this
            machine's clock may be wrong.
        """
        text = "".join(code.split())
        if not text.startswith(_PREFIX) or len(text) > _MOST_CHARACTERS:
            raise InviteInvalid(f"an invitation code starts with {_PREFIX}")
        packed = text.removeprefix(_PREFIX)
        try:
            content = base64.b64decode(packed + "=" * (-len(packed) % 4), b"-_", validate=True)
            body, check = content[:-_CHECK_BYTES], content[-_CHECK_BYTES:]
            secret_end = 5 + _SECRET_BYTES
            url = body[secret_end + _FINGERPRINT_BYTES :].decode("ascii")
        except (binascii.Error, UnicodeDecodeError) as exc:
            raise InviteInvalid("the code has characters that no code has") from exc
        if check != _check(body):
            raise InviteInvalid("the code was cut or typed wrongly: its checksum does not fit")
        return cls(
            expires=int.from_bytes(body[:5], "big"),
            secret=body[5:secret_end].hex(),
            authority=body[secret_end : secret_end + _FINGERPRINT_BYTES].hex(),
            url=_checked_url(url),
        )

    @property
    def secret_digest(self) -> str:
        """What the coordinator stores in place of the secret."""
        return secret_digest(self.secret)

    def expects(self, authority_fingerprint: str) -> bool:
        """Whether the authority with this SHA-256 (hex) is the one that invites."""
        return secrets.compare_digest(
            authority_fingerprint[: 2 * _FINGERPRINT_BYTES], self.authority
        )


def secret_digest(secret: str) -> str:
    """SHA-256 of an invitation's secret, in hex; 128 random bits need no salt and no stretching."""
    return hashlib.sha256(b"silotune invite v1\0" + secret.encode()).hexdigest()


def _check(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:_CHECK_BYTES]


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme == "https" and parts.hostname and parts.path in {"", "/"}
        good = bool(good and not (parts.query or parts.fragment or parts.username))
        _ = parts.port  # raises when it is no number
    except ValueError:
        good = False
    if not good:
        raise InviteInvalid(f"{url!r} is not of the form https://host:port")
    return url.rstrip("/")
