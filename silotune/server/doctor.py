"""The coordinator's doctor: everything it needs, looked at one by one, running or not.

It changes nothing. Checks come in the order in which one trouble causes the next; a check whose ground
is missing says so and is skipped.
"""

from __future__ import annotations

import shutil
import socket
import ssl
from typing import Any

from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from silotune.errors import EnvironmentFault
from silotune.findings import Check, Finding, Skipped, examine
from silotune.protocol.errors import StoreUnusable
from silotune.server.admin.socket_client import AdminClient
from silotune.server.config import (
    AUTHORITY_CERTIFICATE,
    AUTHORITY_KEY,
    FEDERATION_KEY,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    CoordinatorConfig,
    Home,
    read_secret,
)
from silotune.server.errors import CoordinatorConfigInvalid, CoordinatorNotRunning, PortTaken
from silotune.server.listener import bind_public
from silotune.server.store.database import MIGRATIONS
from silotune.trust import identity
from silotune.trust.audit import AuditLog
from silotune.trust.authority import RENEW_DAYS
from silotune.trust.errors import IdentityInvalid, VaultLocked
from silotune.trust.files import require_private, require_private_tree
from silotune.trust.vault import VAULT_FILE, Vault

_LEAST_DISK = 500_000_000
_CONNECT_SECONDS = 5.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where a listener there answers


class CoordinatorDoctor:
    """Looks at one coordinator.

    Parameters
    ----------
    home : Home
        Its folder.

    Raises
    ------
    CoordinatorConfigInvalid
        There is no coordinator in the folder, or its configuration is wrong.
    """

    def __init__(self, home: Home) -> None:
        self._home: Home = home
        self._config: CoordinatorConfig = home.load()
        self._status: dict[str, Any] | None = None

    def examine(self) -> list[Finding]:
        """Every check, in order."""
        checks: list[Check] = [
            ("configuration", self._configuration),
            ("permissions", self._permissions),
            ("keys", self._keys),
            ("certificate", self._certificate),
            ("names", self._names),
            ("daemon", self._daemon),
            ("port", self._port),
            ("store", self._store),
            ("audit log", self._audit),
            ("secrets", self._secrets),
            ("disk", self._disk),
        ]
        return examine(checks)

    def _configuration(self) -> str:
        return f"federation {self._config.federation.name}, in {self._home.root.resolve()}"

    def _permissions(self) -> str:
        for folder in (self._home.root, self._home.keys, self._home.state):
            require_private(folder)
        require_private_tree(self._home.root)
        return "nobody but the owner can look into the folder, and no link leads out of it"

    def _keys(self) -> str:
        if not (self._home.keys / VAULT_FILE).exists():
            raise VaultLocked(
                f"{self._home.keys / VAULT_FILE} is missing", remedy="Restore keys/ from backup."
            )
        vault = Vault(self._home.keys, self._config.at_rest, base=self._home.root)
        for name in (AUTHORITY_KEY, FEDERATION_KEY, SERVER_KEY):
            try:
                vault.read(self._home.keys / name)
            except OSError as exc:
                raise IdentityInvalid(f"{exc.filename}: {exc.strerror}") from exc
        return f"all there, opened by a {vault.opened_by}"

    def _certificate(self) -> str:
        path = self._home.keys / SERVER_CERTIFICATE
        try:
            certificate = identity.certificate_from_pem(path.read_bytes())
        except OSError as exc:
            raise IdentityInvalid(f"{path}: {exc.strerror}") from exc
        left = identity.days_left(certificate)
        if left <= 0:
            raise IdentityInvalid(
                f"the server's certificate ended {-left:.0f} days ago",
                remedy="Restart the coordinator: it renews its certificate at the start.",
            )
        soon = "; a restart renews it" if left < RENEW_DAYS else ""
        return f"valid for {left:.0f} more days{soon}"

    def _names(self) -> str:
        for host in self._config.listen.hosts:
            try:
                socket.getaddrinfo(host, self._config.listen.port, type=socket.SOCK_STREAM)
            except OSError as exc:
                raise CoordinatorConfigInvalid(
                    f"listen.hosts: {host}: {exc.strerror or exc}",
                    remedy="Have the name added to the name service, or correct listen.hosts.",
                ) from exc
        return f"known here: {', '.join(self._config.listen.hosts)}"

    def _daemon(self) -> str:
        try:
            found = AdminClient(self._home).get("/status")
        except CoordinatorNotRunning:
            raise Skipped("it does not run; silotune coordinator start") from None
        self._status = found
        online = ", ".join(found["online"]) or "none"
        return f"it runs for {found['up_seconds']:.0f} s; sites online: {online}"

    def _port(self) -> str:
        listen = self._config.listen
        if self._status is None:
            bind_public(listen.host, listen.port).close()
            return f"port {listen.port} of {listen.host} is free"
        port = int(self._status["url"].rpartition(":")[2])
        host = _ANYWHERE.get(listen.host, listen.host)
        authority = str(self._home.keys / AUTHORITY_CERTIFICATE)
        context = ssl.create_default_context(cafile=authority)
        try:
            with (
                socket.create_connection((host, port), timeout=_CONNECT_SECONDS) as plain,
                context.wrap_socket(plain, server_hostname=listen.hosts[0]) as tls,
            ):
                return f"{host} answers on port {port} with {tls.version()}"
        except OSError as exc:
            raise PortTaken(
                f"the daemon runs, and {host}, port {port} does not answer as it should: {exc}",
                remedy="Restart the coordinator if listen was changed; else look into its log.",
            ) from exc

    def _store(self) -> str:
        url = make_url(self._home.store_url(self._config))
        if url.get_backend_name() == "sqlite":
            if not (self._home.state / str(url.database)).exists():
                raise Skipped("it is made at the first start")
            url = url.set(database=f"file:{url.database}", query={"mode": "ro", "uri": "true"})
        try:
            engine = create_engine(url)
            with engine.connect() as connection:
                version = connection.scalar(text("SELECT version_num FROM alembic_version"))
            engine.dispose()
            ScriptDirectory(str(MIGRATIONS)).get_revision(str(version))
        except CommandError as exc:
            raise StoreUnusable(f"its tables are of a version {version!r} not known here") from exc
        except (SQLAlchemyError, ImportError) as exc:
            raise StoreUnusable(f"it can't be read ({type(exc).__name__})") from exc
        return f"{url.get_backend_name()}, its tables of version {version}"

    def _audit(self) -> str:
        if not self._home.audit_path.exists():
            raise Skipped("there is none yet")
        return f"whole, {AuditLog(self._home.audit_path).verify().seq} lines"

    def _secrets(self) -> str:
        named = {
            "dashboard.metrics_token_file": self._config.dashboard.metrics_token_file,
            "alerts.webhook_secret_file": self._config.alerts.webhook_secret_file,
            "alerts.smtp_password_file": self._config.alerts.smtp_password_file,
        }
        given = {key: path for key, path in named.items() if path is not None}
        if not given:
            raise Skipped("the configuration names no file")
        for key, path in given.items():
            read_secret(self._home.root / path, key=key)
        return f"readable: {', '.join(given)}"

    def _disk(self) -> str:
        free = shutil.disk_usage(self._home.root).free
        if free < _LEAST_DISK:
            raise EnvironmentFault(
                f"{free / 1e6:.0f} MB are free at {self._home.root}, wanted are 500 MB",
                remedy="Free the disk: without room no round can be saved.",
            )
        return f"{free / 1e9:.1f} GB are free"
