"""The federation's certificate authority: one P-384 key that issues every certificate (RFC 5280)."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from silotune.trust.errors import IdentityInvalid
from silotune.trust.identity import (
    Subject,
    common_name,
    new_node_key,
    public_pem,
    read_request,
    role_uri,
)

SITE_DAYS = 90
"""Validity of a site's certificate."""

SERVER_DAYS = 365
"""Validity of the coordinator's own certificate."""

RENEW_DAYS = 30
"""A certificate with fewer days left is renewed."""

_AUTHORITY_DAYS = 3650
_BACKDATED = timedelta(hours=1)  # so that a clock a little behind accepts a fresh certificate


@dataclass(frozen=True)
class Authority:
    """Key and self-signed certificate of the authority.

    Build it with `create`, or from what was stored.
    """

    key: EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create(cls, federation: str) -> Authority:
        """A new authority, whose certificate is valid for ten years."""
        key = new_node_key()
        name = common_name(f"{federation} authority")
        builder = (
            _builder(name, name, key.public_key(), days=_AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        return cls(key, builder.sign(key, hashes.SHA384()))

    def __post_init__(self) -> None:
        public = self.certificate.public_key()
        if not isinstance(public, EllipticCurvePublicKey) or (
            public_pem(public) != public_pem(self.key.public_key())
        ):
            raise IdentityInvalid("the authority's key does not fit its certificate")

    def issue_server(
        self, key: EllipticCurvePublicKey, *, hosts: Sequence[str], days: float = SERVER_DAYS
    ) -> x509.Certificate:
        """A certificate for the coordinator under host names and IP addresses."""
        if not hosts:
            raise IdentityInvalid("a server certificate needs at least one host")
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        return self._issue(
            common_name(hosts[0]), key, names, ExtendedKeyUsageOID.SERVER_AUTH, days=days
        )

    def issue_client(
        self, request: str, *, subject: Subject, days: float = SITE_DAYS
    ) -> x509.Certificate:
        """A certificate for a site or a person, from a request in their own name.

        Raises
        ------
        IdentityInvalid
            The request is damaged, or for another name.
        """
        key = read_request(request, name=subject.name)
        return self._issue(
            common_name(subject.name),
            key,
            role_uri(subject.role),
            ExtendedKeyUsageOID.CLIENT_AUTH,
            days=days,
        )

    def _issue(
        self,
        subject: x509.Name,
        key: EllipticCurvePublicKey,
        names: x509.SubjectAlternativeName,
        purpose: x509.ObjectIdentifier,
        *,
        days: float,
    ) -> x509.Certificate:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (
            _builder(subject, self.certificate.subject, key, days=days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(names, critical=False)
            .add_extension(issuer, critical=False)
        )
        return builder.sign(self.key, hashes.SHA384())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey, *, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as exc:
        raise IdentityInvalid(f"{host!r} is neither an IP address nor an ASCII host name") from exc
