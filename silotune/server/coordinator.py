"""The coordinator: one process, one public port, one admin socket, runs as threads."""

from __future__ import annotations

import fcntl
import json
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from silotune.flower.superlink import LinkState, Signal
from silotune.protocol.envelope import COORDINATOR
from silotune.server.admin.operations import CoordinatorParts, Operations
from silotune.server.admin.socket import AdminRoutes
from silotune.server.books import Books, Certificates
from silotune.server.config import (
    CoordinatorConfig,
    CoordinatorKeys,
    Home,
    create_keys,
    load_keys,
)
from silotune.server.enrolment import Registrar
from silotune.server.errors import CoordinatorConfigInvalid, CoordinatorRunning, FolderInUse
from silotune.server.guard import Guard
from silotune.server.listener import (
    AccountProtocol,
    Listener,
    bind_private,
    bind_public,
    server_tls,
)
from silotune.server.monitoring import Monitoring
from silotune.server.routes import SiteRoutes
from silotune.server.run_control import RunControl, RunParts
from silotune.server.store.database import Store
from silotune.server.store.runs import FederationLog, Runs
from silotune.trust.audit import AuditLog
from silotune.trust.files import create_private_folder, replace_file, require_private_tree
from silotune.trust.vault import Vault

_log = logging.getLogger(__name__)

_ALARM_SECONDS = 60.0

_CONFIG = """\
# A silotune coordinator. Every key is shown; those in comments have the value that is the default.

[federation]
name = {name}                # what sites see; it can't be changed later

[listen]
host = {host}                # address of this machine to listen on; "::" for IPv6
port = {port}                  # the one port that sites reach, by HTTPS
hosts = [{hosts}]              # names and addresses in the certificate; the first goes into invitations

[store]
# url = "sqlite:///…"          # default: state/coordinator.sqlite here; or postgresql+psycopg://user@host/db

[link]
# patience = 120.0             # seconds that a site may be offline before a round goes on without it

[admin]                        # the gRPC API for `silotune admin`, with certificates of people
# host = "127.0.0.1"
# port = 8444                  # no port: no API

[dashboard]                    # the web pages
# host = "127.0.0.1"
# port = 8445                  # no port: no pages

[alerts]                       # webhooks and e-mail; docs/monitoring.md lists every key
# webhooks = ["https://hooks.example.org/silotune"]

[at_rest]                      # what opens the sealed keys, adapters and checkpoints: one of
# key_file = "/etc/silotune/coordinator.key"   # default: keys/vault.key here, on the same disk
# passphrase_file = "${{CREDENTIALS_DIRECTORY}}/passphrase"
# passphrase_env = "SILOTUNE_PASSPHRASE"

[logging]
# format = "text"              # or "json": one object a line
# level = "info"               # debug, info, warning, error
"""


def create(
    home: Home, *, name: str, hosts: Sequence[str], listen: str, port: int, at_rest: str = ""
) -> tuple[CoordinatorConfig, CoordinatorKeys]:
    """Make a federation: folder, configuration, authority, keys, store, audit log.

    Parameters
    ----------
    home : Home
        A folder that is empty or does not exist.
    name : str
        The federation's.
    hosts : sequence of str
        Names and IP addresses under which sites reach this machine.
    listen, port
        Where to listen.
    at_rest : str
        A line of TOML for ``[at_rest]``, such as ``key_file = "…"``; empty for a key file in the folder.

    Raises
    ------
    FolderInUse
        The folder holds something.
    CoordinatorConfigInvalid
        A value is not usable.
    """
    if home.root.exists() and any(home.root.iterdir()):
        raise FolderInUse(f"{home.root.resolve()} is not empty")
    create_private_folder(home.root)
    listed = ", ".join(map(json.dumps, hosts))
    text = _CONFIG.format(name=json.dumps(name), host=json.dumps(listen), port=port, hosts=listed)
    if at_rest:
        text = text.replace("[at_rest] ", f"[at_rest]\n{at_rest}\n#", 1)
    replace_file(home.config_path, text.encode())
    try:
        config = home.load()
    except CoordinatorConfigInvalid:
        home.config_path.unlink()
        raise
    create_private_folder(home.state)
    vault = Vault(home.keys, config.at_rest, base=home.root)
    keys = create_keys(home, vault, federation=name, hosts=hosts)
    audit = AuditLog(home.audit_path, owner=COORDINATOR)
    audit.append("federation_created", federation=name, authority=keys.fingerprint)
    return config, keys


class Coordinator:
    """Everything that runs in the process.

    Parameters
    ----------
    home : Home
        The folder.

    Raises
    ------
    CoordinatorConfigInvalid, CoordinatorRunning, StoreUnusable, IdentityInvalid, PortTaken
        It can't start here.
    """

    def __init__(self, home: Home) -> None:
        self.home, self.config = home, home.load()
        require_private_tree(home.root)
        self._lock = hold_folder(home.lock_path)
        vault = Vault(home.keys, self.config.at_rest, base=home.root)
        self.keys = load_keys(home, vault, hosts=self.config.listen.hosts)
        self.audit = AuditLog(home.audit_path, owner=COORDINATOR)
        if vault.end_previous():
            self.audit.append("resealed", opened_by=vault.opened_by)
        self.store = Store(home.store_url(self.config), vault=vault)
        home.link_database.touch(mode=0o600)
        self.link = LinkState(home.link_database, vault=vault)
        self.signal = Signal()
        self.log = FederationLog(self.store, on_event=self.signal.fire)
        self._alarms: dict[tuple[str, str], float] = {}
        self._stopping = threading.Event()
        self._public = bind_public(self.config.listen.host, self.config.listen.port)
        self.port = int(self._public.getsockname()[1])
        self._assemble()

    @property
    def url(self) -> str:
        """What sites connect to."""
        host = self.config.listen.hosts[0]
        return f"https://{f'[{host}]' if ':' in host else host}:{self.port}"

    def _assemble(self) -> None:
        federation = self.config.federation.name
        self.registrar = Registrar(
            federation=federation,
            store=self.store,
            keys=self.keys,
            link=self.link,
            audit=self.audit,
            changed=self._sites_changed,
        )
        self.books = Books(
            store=self.store,
            keys=self.keys,
            registrar=self.registrar,
            audit=self.audit,
            alarm=self.alarm,
            changed=self._sites_changed,
        )
        run_parts = RunParts(
            store=self.store,
            runs=Runs(self.store),
            link=self.link,
            keys=self.keys,
            registrar=self.registrar,
            serves=self.books.serves,
            patience=self.config.link.patience,
            events=self.signal,
            alarm=self.alarm,
        )
        self.run_control = RunControl(run_parts, audit=self.audit, changed=self._news)
        self.routes = SiteRoutes(
            registrar=self.registrar,
            run_control=self.run_control,
            keys=self.keys,
            books=self.books,
            certificates=Certificates(self.store, self.registrar, self.audit),
        )
        self.guard = Guard(
            link=self.link,
            routes=self.routes.app(),
            admission=self.registrar,
            serves=self.books.serves,
            alarm=self.alarm,
        )
        parts = CoordinatorParts(
            home=self.home,
            config=self.config,
            keys=self.keys,
            store=self.store,
            link=self.link,
            audit=self.audit,
            log=self.log,
            registrar=self.registrar,
            books=self.books,
            run_control=self.run_control,
            url=self.url,
        )
        self.operations = Operations(parts)
        self._admin = AdminRoutes(self.operations)
        self._monitoring = Monitoring(parts, self.operations)

    # --- life ---

    def start(self) -> None:
        """Listen, and go on with every run that was under way."""
        tls = server_tls(self.home, self.keys)
        self._front = Listener(self.guard, bound=self._public, tls=tls)
        private = bind_private(self.home.socket_path)
        self._back = Listener(self._admin.app(), bound=private, tls=None, protocol=AccountProtocol)
        self._front.start()
        self._back.start()
        self._monitoring.start()
        self.run_control.start()
        self.audit.append("coordinator_started")
        _log.info(
            "federation %s at %s, authority %s, roster version %d",
            self.config.federation.name,
            self.url,
            self.keys.fingerprint[:16],
            self.registrar.roster.version,
        )

    def wait(self) -> None:
        """Until `stop` is called, from a signal handler or elsewhere."""
        while not self._stopping.wait(timeout=3600.0):
            pass

    def stop(self) -> None:
        """Have `wait` return."""
        self._stopping.set()

    def close(self) -> None:
        """Stop listening and leave; runs stay where they are and go on with the next process."""
        self.run_control.close()
        self._monitoring.stop()
        self.guard.long_poll.close()
        self.routes.long_poll.close()
        self._admin.close()
        self._front.stop()
        self._back.stop()
        self.home.socket_path.unlink(missing_ok=True)
        self.audit.append("coordinator_stopped")
        self.store.close()
        self._lock.close()

    # --- what the parts tell ---

    def alarm(self, kind: str, *, site: str, **fields: Any) -> None:
        """Note what only an attack or a mistake explains; once a minute for each kind and site."""
        now = time.monotonic()
        if now - self._alarms.get((kind, site), -_ALARM_SECONDS) < _ALARM_SECONDS:
            return
        self._alarms[kind, site] = now
        _log.warning("alarm: %s by %s %s", kind, site, fields or "")
        self.audit.append("alarm", what=kind, site=site, **fields)
        self.log.append("alarm", kind=kind, site=site, detail=str(fields.get("detail", "")))

    def _sites_changed(self) -> None:
        self._news()
        self.link.arrived.fire()
        self.guard.long_poll.wake_all()  # a site that was revoked must not stay connected
        self.run_control.reconsider()

    def _news(self) -> None:
        routes = getattr(self, "routes", None)
        if routes is not None:
            routes.long_poll.wake_all()


def hold_folder(path: Path) -> Any:
    """The folder's lock, for as long as the file is open. Raises `CoordinatorRunning`."""
    create_private_folder(path.parent)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        file.close()
        raise CoordinatorRunning(f"{path} is locked") from exc
    return file
