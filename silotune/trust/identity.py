"""Who is who: keys, certificates, people, and fingerprints that two of them can read to each other.

A site has two keys. The Ed25519 *signing key* (RFC 8032), made once and private to its owner, signs what
it says: approvals, payloads, audit heads. The P-384 *node key* authenticates its connection to TLS, with
a certificate of the federation's own authority. No private key ever leaves the machine it was made on:
the authority sees a certificate request (PKCS #10) only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pwd
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import NameOID

from silotune.errors import EnvironmentFault
from silotune.trust.errors import IdentityInvalid, NotPermitted
from silotune.trust.files import create_file, create_private_folder, require_private

Role = Literal["site", "viewer", "operator"]
"""What the holder of a client certificate may be: a site, or a person of the coordinator's side."""

_ROLE_URI = "urn:silotune:"
_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aiou"


# --- keys ---


def new_node_key() -> EllipticCurvePrivateKey:
    """A fresh P-384 key, of the kind that Flower registers nodes by."""
    return generate_private_key(SECP384R1())


def private_pem(key: EllipticCurvePrivateKey) -> bytes:
    """PKCS #8 in PEM, not encrypted: for a file of mode 0600 or to be sealed."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def node_key_from_pem(pem: bytes) -> EllipticCurvePrivateKey:
    """Read what `private_pem` wrote. Raises `IdentityInvalid`."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as exc:
        raise IdentityInvalid("not a private key in PEM format") from exc
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise IdentityInvalid("not a P-384 key")
    return key


def public_pem(key: EllipticCurvePublicKey) -> str:
    """SubjectPublicKeyInfo in PEM: the form in which Flower registers and compares node keys."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def public_node_key(pem: str) -> EllipticCurvePublicKey:
    """Read what `public_pem` wrote. Raises `IdentityInvalid`."""
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, TypeError) as exc:
        raise IdentityInvalid("not a public key in PEM format") from exc
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise IdentityInvalid("not a P-384 public key")
    return key


def encode_signing_key(key: Ed25519PublicKey) -> str:
    """Base64 of the raw 32 bytes."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def decode_signing_key(text: str) -> Ed25519PublicKey:
    """Read what `encode_signing_key` wrote. Raises `IdentityInvalid`."""
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
    except ValueError as exc:
        raise IdentityInvalid("not an Ed25519 public key") from exc


# --- fingerprints ---


def six_words(*, name: str, signing_key: str, node_key: str) -> str:
    """A site's identity as six pronounceable words, for two people on the telephone.

    The first 96 bits of a SHA-256 over name and both public keys, as proquints (Wilkerson 2009,
    arXiv:0901.4016): an attacker has to try some 2^95 keys to match them.
    """
    text = json.dumps([name, signing_key, node_key], separators=(",", ":"))
    digest = hashlib.sha256(b"silotune identity v1\0" + text.encode()).digest()
    return "-".join(_proquint(digest[i : i + 2]) for i in range(0, 12, 2))


def _proquint(pair: bytes) -> str:
    number = int.from_bytes(pair, "big")
    return "".join(
        alphabet[(number >> shift) & (len(alphabet) - 1)]
        for alphabet, shift in (
            (_CONSONANTS, 12),
            (_VOWELS, 10),
            (_CONSONANTS, 6),
            (_VOWELS, 4),
            (_CONSONANTS, 0),
        )
    )


def certificate_fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 over the certificate's DER bytes, in hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


# --- certificates ---


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whom a client certificate speaks for."""

    name: str
    role: Role


def role_uri(role: Role) -> x509.SubjectAlternativeName:
    """The extension that says what the holder of a certificate is."""
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(_ROLE_URI + role)])


def common_name(name: str) -> x509.Name:
    """A distinguished name of one part."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def subject_of(certificate: x509.Certificate) -> Subject:
    """Name and role of a client certificate. Raises `IdentityInvalid`."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound as exc:
        raise IdentityInvalid("the certificate says no role") from exc
    uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
    roles = [uri.removeprefix(_ROLE_URI) for uri in uris if uri.startswith(_ROLE_URI)]
    if len(names) != 1 or len(roles) != 1 or roles[0] not in get_args(Role):
        raise IdentityInvalid("the certificate does not say one name and one role")
    return Subject(name=str(names[0].value), role=roles[0])  # type: ignore[arg-type]


def certificate_from_pem(pem: str | bytes) -> x509.Certificate:
    """Parse one certificate. Raises `IdentityInvalid`."""
    try:
        return x509.load_pem_x509_certificate(pem.encode() if isinstance(pem, str) else pem)
    except ValueError as exc:
        raise IdentityInvalid("not a certificate in PEM format") from exc


def make_request(name: str, key: EllipticCurvePrivateKey) -> str:
    """A certificate request (PKCS #10, PEM) for `name`, signed with the key it is for."""
    request = x509.CertificateSigningRequestBuilder().subject_name(common_name(name))
    return request.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM).decode()


def read_request(pem: str, *, name: str) -> EllipticCurvePublicKey:
    """The key that a certificate request proves possession of.

    Raises
    ------
    IdentityInvalid
        It is damaged, of another name, of another kind of key, or not signed with that key.
    """
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        signed = request.is_signature_valid
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key = request.public_key()
    except (ValueError, TypeError) as exc:
        raise IdentityInvalid("not a certificate request in PEM format") from exc
    if not signed:
        raise IdentityInvalid("the certificate request is not signed with its own key")
    if [attribute.value for attribute in names] != [name]:
        raise IdentityInvalid("the certificate request is for another name")
    return public_node_key(_pem_of(key))


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority signed the certificate, and it is valid at this moment."""
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        return False
    key = authority.public_key()
    if not isinstance(key, EllipticCurvePublicKey) or certificate.issuer != authority.subject:
        return False
    try:
        key.verify(
            certificate.signature,
            certificate.tbs_certificate_bytes,
            ECDSA(certificate.signature_hash_algorithm or hashes.SHA384()),
        )
    except InvalidSignature:
        return False
    return True


def key_of(certificate: x509.Certificate) -> str:
    """The public node key of a certificate, in PEM. Raises `IdentityInvalid`."""
    return _pem_of(certificate.public_key())


def days_left(certificate: x509.Certificate) -> float:
    """Days until a certificate expires; negative when it has."""
    return (certificate.not_valid_after_utc - datetime.now(UTC)).total_seconds() / 86400.0


def chain_pem(certificates: Sequence[x509.Certificate]) -> str:
    """Certificates one behind the other, as TLS servers and clients read them."""
    return "".join(c.public_bytes(Encoding.PEM).decode() for c in certificates)


def _pem_of(key: object) -> str:
    if not isinstance(key, EllipticCurvePublicKey):
        raise IdentityInvalid("not an elliptic-curve key")
    return public_pem(key)


def load_or_create(path: Path, *, to_disk: bool = True) -> Ed25519PrivateKey:
    """The key at `path` (PKCS #8 PEM, mode 0600); a new one if there is no file.

    Two processes that start at once end up with the same key. A new one is forced to the disk, except
    in simulations.

    Raises
    ------
    FileExposed
        Other accounts of the machine may read or write it.
    EnvironmentFault
        The file is not an Ed25519 key.
    """
    if not path.exists():
        create_private_folder(path.parent, to_disk=to_disk)
        fresh = Ed25519PrivateKey.generate()
        pem = fresh.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        create_file(path, pem, to_disk=to_disk)
    require_private(path)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as exc:
        raise EnvironmentFault(f"{path} is not a private key in PEM format") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise EnvironmentFault(f"{path} is not an Ed25519 key")
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, in hex: what two people compare over the telephone."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


PersonRole = Literal["viewer", "operator"]


@dataclass(frozen=True, kw_only=True)
class Person:
    """Somebody who is known: by a certificate, a password, or a link that only they were given."""

    name: str
    role: PersonRole

    def require_operator(self) -> None:
        """Raise `NotPermitted` for anybody but an operator."""
        if self.role != "operator":
            raise NotPermitted(f"{self.name} is a {self.role}; this needs an operator")


def account_of(uid: int) -> Person:
    """An account of the operating system that runs the coordinator's commands: an operator."""
    try:
        name = pwd.getpwuid(uid).pw_name[:40]
    except KeyError:
        name = "account"
    return Person(name=f"{name} (uid {uid})", role="operator")
