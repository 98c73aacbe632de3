"""The coordinator's own keys: the authority, the federation's signing key, the server's certificate.

Private keys lie sealed in the folder. The server's is handed to TLS through a file in memory only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from silotune.federation import identity
from silotune.federation.authority import RENEW_DAYS, Authority
from silotune.federation.errors import IdentityInvalid
from silotune.federation.sealed import Vault
from silotune.privacy.durable import replace_file
from silotune.server.config import Home

_log = logging.getLogger(__name__)

AUTHORITY_KEY, FEDERATION_KEY, SERVER_KEY = "authority.key", "federation.key", "server.key"
AUTHORITY_CERTIFICATE, SERVER_CERTIFICATE = "authority.pem", "server.pem"


@dataclass(frozen=True)
class Keys:
    """Everything the coordinator signs with.

    Attributes
    ----------
    authority : Authority
        Issues certificates.
    signing : Ed25519PrivateKey
        The federation's key: plans, rosters, payloads, audit heads.
    server_key : EllipticCurvePrivateKey
        Of the server's certificate.
    server_certificate : Certificate
        What sites see.
    """

    authority: Authority
    signing: Ed25519PrivateKey
    server_key: EllipticCurvePrivateKey
    server_certificate: x509.Certificate

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's certificate, in hex."""
        return identity.certificate_fingerprint(self.authority.certificate)

    @contextmanager
    def key_file(self) -> Iterator[Path]:
        """The server's key as a file that is never on a disk, for Python's TLS."""
        descriptor = os.memfd_create("server-key", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, identity.private_pem(self.server_key))
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)


def create_keys(home: Home, vault: Vault, *, federation: str, hosts: Sequence[str]) -> Keys:
    """Make all keys and the first certificates, and store them."""
    authority = Authority.create(federation)
    signing, server_key = Ed25519PrivateKey.generate(), identity.new_node_key()
    raw = signing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    vault.write(home.keys / AUTHORITY_KEY, identity.private_pem(authority.key))
    vault.write(home.keys / FEDERATION_KEY, raw)
    vault.write(home.keys / SERVER_KEY, identity.private_pem(server_key))
    _write_certificate(home.keys / AUTHORITY_CERTIFICATE, authority.certificate)
    certificate = _issue(home, authority, server_key, hosts)
    return Keys(authority, signing, server_key, certificate)


def load_keys(home: Home, vault: Vault, *, hosts: Sequence[str]) -> Keys:
    """Read what `create_keys` stored; a server certificate that is due or lacks a host is renewed.

    Raises
    ------
    IdentityInvalid
        A file is missing or damaged.
    SealBroken, VaultLocked
        From the vault.
    """
    try:
        authority = Authority(
            identity.node_key_from_pem(vault.read(home.keys / AUTHORITY_KEY)),
            identity.certificate_from_pem((home.keys / AUTHORITY_CERTIFICATE).read_bytes()),
        )
        signing = load_pem_private_key(vault.read(home.keys / FEDERATION_KEY), password=None)
        server_key = identity.node_key_from_pem(vault.read(home.keys / SERVER_KEY))
        certificate = identity.certificate_from_pem((home.keys / SERVER_CERTIFICATE).read_bytes())
    except OSError as exc:
        raise IdentityInvalid(f"{exc.filename}: {exc.strerror}") from exc
    if not isinstance(signing, Ed25519PrivateKey):
        raise IdentityInvalid(f"{home.keys / FEDERATION_KEY} is not an Ed25519 key")
    if identity.days_left(certificate) < RENEW_DAYS or not _covers(certificate, hosts):
        certificate = _issue(home, authority, server_key, hosts)
        _log.info("the server's certificate was renewed for %s", ", ".join(hosts))
    return Keys(authority, signing, server_key, certificate)


def _issue(
    home: Home, authority: Authority, key: EllipticCurvePrivateKey, hosts: Sequence[str]
) -> x509.Certificate:
    certificate = authority.issue_server(key.public_key(), hosts=hosts)
    _write_certificate(home.keys / SERVER_CERTIFICATE, certificate)
    return certificate


def _covers(certificate: x509.Certificate, hosts: Sequence[str]) -> bool:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names} == set(hosts)


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    replace_file(path, identity.chain_pem([certificate]).encode())
