"""coordinator.toml, the coordinator's own keys, and where everything lies in its folder.

The keys are the authority's, the federation's signing key, and the server's with its certificate.
Private ones lie sealed in the folder. The server's is handed to TLS through a file in memory only.
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import AfterValidator, Field, ValidationError

from silotune.events.view import UNLIKE
from silotune.plan.explain import explain
from silotune.plan.sections import Name, Section
from silotune.server.errors import CoordinatorConfigInvalid
from silotune.trust import identity
from silotune.trust.audit import AUDIT_FILE
from silotune.trust.authority import RENEW_DAYS, Authority
from silotune.trust.errors import IdentityInvalid
from silotune.trust.files import replace_file, require_private, require_unwritable
from silotune.trust.vault import AtRest, Vault

CONFIG_FILE = "coordinator.toml"

Port = Annotated[int, Field(ge=0, le=65535)]


def _host(text: str) -> str:
    """An IP address or a host name (RFC 1123), as a certificate and a browser take it."""
    try:
        return str(ip_address(text))
    except ValueError:
        pass
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in text.split(".")):
        raise ValueError(
            f"{text!r} is neither an IP address nor a host name: letters, digits, '-' and '.'"
        )
    return text


Host = Annotated[str, AfterValidator(_host)]
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


class FederationSection(Section):
    """``[federation]``: what it is called."""

    name: Name


class ListenSection(Section):
    """``[listen]``: the one public address."""

    host: str = Field("0.0.0.0", min_length=1)  # noqa: S104 - sites come from outside
    port: Port = 8443
    hosts: tuple[Host, ...] = Field(min_length=1)
    """Names and IP addresses that the server's certificate is valid for; the first is in invitations."""


class StoreSection(Section):
    """``[store]``: where the coordinator keeps what must not be lost."""

    url: str | None = None


class LinkSection(Section):
    """``[link]``: how patient rounds are with sites."""

    patience: Annotated[float, Field(gt=0.0)] = 120.0
    """Seconds that a site may be offline before the round goes on without it."""


class AdminSection(Section):
    """``[admin]``: the gRPC API for `silotune admin`; without a port there is none."""

    host: str = Field("127.0.0.1", min_length=1)
    port: Port | None = None


class DashboardSection(Section):
    """``[dashboard]``: the web pages; without a port there are none."""

    host: str = Field("127.0.0.1", min_length=1)
    port: Port | None = None
    hosts: tuple[Host, ...] = ()
    """Names under which browsers may ask for it, besides those in the certificate."""

    metrics_token_file: Path | None = None
    """File with the token that Prometheus has to show; without it, it needs a certificate."""


class AlertsSection(Section):
    """``[alerts]``: who is told what; nothing is sent unless a receiver is named."""

    webhooks: tuple[str, ...] = ()
    webhook_secret_file: Path | None = None
    """File with the key of the HMAC-SHA256 that each request carries."""

    smtp_host: str = ""
    smtp_port: Port = 587
    smtp_starttls: bool = True
    smtp_user: str = ""
    smtp_password_file: Path | None = None
    mail_from: str = ""
    mail_to: tuple[str, ...] = ()
    stuck_seconds: Annotated[float, Field(gt=0.0)] = 3600.0
    """A running run without an event for so long is stuck."""

    silent_seconds: Annotated[float, Field(gt=0.0)] = 300.0
    """A site without a heartbeat for so long is silent."""

    anomaly: Annotated[float, Field(gt=0.0)] = UNLIKE
    """An anomaly score above this is told."""


class LoggingSection(Section):
    """``[logging]``: to standard error."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class CoordinatorConfig(Section):
    """All of it."""

    federation: FederationSection
    listen: ListenSection
    store: StoreSection = StoreSection()
    link: LinkSection = LinkSection()
    at_rest: AtRest = AtRest()
    admin: AdminSection = AdminSection()
    dashboard: DashboardSection = DashboardSection()
    alerts: AlertsSection = AlertsSection()
    logging: LoggingSection = LoggingSection()


def read_secret(path: Path, *, key: str) -> bytes:
    """The content of a file that a key of the configuration names, without white space around it.

    Raises
    ------
    CoordinatorConfigInvalid
        It can't be read, or is not UTF-8 text; with the key and the path.
    """
    try:
        return path.read_text(encoding="utf-8").strip().encode()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "not UTF-8 text"
        raise CoordinatorConfigInvalid(
            f"{key}: {path}: {why}", remedy="Correct the path, or make the file readable."
        ) from exc


@dataclass(frozen=True)
class Home:
    """A coordinator's folder.

    Attributes
    ----------
    root : Path
        Holds ``coordinator.toml``, ``keys/`` and ``state/``; of mode 0700.
    """

    root: Path

    @property
    def config_path(self) -> Path:
        """The configuration."""
        return self.root / CONFIG_FILE

    @property
    def keys(self) -> Path:
        """Sealed private keys, and certificates."""
        return self.root / "keys"

    @property
    def state(self) -> Path:
        """Databases, audit log, admin socket."""
        return self.root / "state"

    @property
    def link_database(self) -> Path:
        """Flower's link state: messages under way."""
        return self.state / "link.sqlite"

    @property
    def audit_path(self) -> Path:
        """The coordinator's audit log."""
        return self.state / AUDIT_FILE

    @property
    def socket_path(self) -> Path:
        """The admin socket."""
        return self.state / "admin.sock"

    @property
    def lock_path(self) -> Path:
        """Held by the running process."""
        return self.state / "lock"

    def store_url(self, config: CoordinatorConfig) -> str:
        """Where our own store is."""
        return config.store.url or f"sqlite:///{(self.state / 'coordinator.sqlite').resolve()}"

    def load(self) -> CoordinatorConfig:
        """Read the configuration.

        Raises
        ------
        CoordinatorConfigInvalid
            It is missing or wrong; the message lists every wrong key.
        FileExposed
            Other accounts may write it, or enter the folder.
        """
        if self.config_path.exists():
            require_unwritable(self.config_path)
            require_private(self.root)
        try:
            raw = tomllib.loads(self.config_path.read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise CoordinatorConfigInvalid(
                f"there is no coordinator in {self.root.resolve()}",
                remedy="Name its folder by --dir or SILOTUNE_COORDINATOR, or make a federation with "
                "`silotune coordinator init --dir DIR`.",
            ) from exc
        except OSError as exc:
            raise CoordinatorConfigInvalid(f"{self.config_path}: {exc.strerror or exc}") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise CoordinatorConfigInvalid(f"{self.config_path} is not TOML: {exc}") from exc
        try:
            return CoordinatorConfig.model_validate(raw, strict=False)
        except ValidationError as exc:
            listed = "\n".join(f"  - {line}" for line in explain(exc, CoordinatorConfig))
            raise CoordinatorConfigInvalid(f"{self.config_path}:\n{listed}") from exc


_log = logging.getLogger(__name__)

AUTHORITY_KEY, FEDERATION_KEY, SERVER_KEY = "authority.key", "federation.key", "server.key"
AUTHORITY_CERTIFICATE, SERVER_CERTIFICATE = "authority.pem", "server.pem"


@dataclass(frozen=True)
class CoordinatorKeys:
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


def create_keys(
    home: Home, vault: Vault, *, federation: str, hosts: Sequence[str]
) -> CoordinatorKeys:
    """Make all keys and the first certificates, and store them."""
    authority = Authority.create(federation)
    signing, server_key = Ed25519PrivateKey.generate(), identity.new_node_key()
    raw = signing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    vault.write(home.keys / AUTHORITY_KEY, identity.private_pem(authority.key))
    vault.write(home.keys / FEDERATION_KEY, raw)
    vault.write(home.keys / SERVER_KEY, identity.private_pem(server_key))
    _write_certificate(home.keys / AUTHORITY_CERTIFICATE, authority.certificate)
    certificate = _issue(home, authority, server_key, hosts)
    return CoordinatorKeys(authority, signing, server_key, certificate)


def load_keys(home: Home, vault: Vault, *, hosts: Sequence[str]) -> CoordinatorKeys:
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
    return CoordinatorKeys(authority, signing, server_key, certificate)


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
