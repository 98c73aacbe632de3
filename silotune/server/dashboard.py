"""The coordinator's own web pages: passwords or certificates of people, over TLS off loopback."""

from __future__ import annotations

import functools
import ssl
from typing import TYPE_CHECKING

from cryptography import x509

from silotune.dashboard.accounts import Accounts
from silotune.dashboard.doorman import Door
from silotune.dashboard.pages import Content, build
from silotune.dashboard.serve import LOOPBACK
from silotune.federation.person import Person
from silotune.server.config import read_secret
from silotune.server.keys import AUTHORITY_CERTIFICATE, SERVER_CERTIFICATE
from silotune.server.listener import BrowserProtocol, Listener, bind_public, tls_context
from silotune.server.metrics import Metrics

if TYPE_CHECKING:
    from silotune.server.coordinator import Coordinator
    from silotune.server.monitoring import Monitoring

ACCOUNTS_FILE = "accounts.json"
"""Name of the file with the passwords' hashes, in the coordinator's state folder."""


def make_dashboard(coordinator: Coordinator, monitoring: Monitoring, *, port: int) -> Listener:
    """The pages, ready to be served.

    On loopback they are served without TLS, so that a tunnel or a proxy can end there; on any other
    address with the coordinator's own certificate, and client certificates sign in.

    Raises
    ------
    PortTaken
        The address can't be used.
    CoordinatorConfigInvalid
        The token's file can't be read.
    """
    config = coordinator.config.dashboard
    tls = None if config.host in LOOPBACK else _tls(coordinator)
    names = {*config.hosts, *coordinator.config.listen.hosts, config.host}
    door = Door(
        hosts=frozenset(names | (LOOPBACK if tls is None else set())),
        tls=tls is not None,
        accounts=Accounts(coordinator.home.state / ACCOUNTS_FILE),
        holder=functools.partial(_holder, coordinator, monitoring) if tls else None,
        refused=monitoring.operations.refused,
    )
    content = Content(
        title=coordinator.config.federation.name,
        source=monitoring.operations.source,
        desk=monitoring.operations,
        metrics=Metrics(monitoring.operations).text,
        metrics_token=_token(coordinator),
    )
    bound = bind_public(config.host, port)
    return Listener(build(content, door), bound=bound, tls=tls, protocol=BrowserProtocol)


def _holder(
    coordinator: Coordinator, monitoring: Monitoring, certificate: x509.Certificate
) -> Person:
    return monitoring.people.holder(certificate, coordinator.keys.authority.certificate)


def _tls(coordinator: Coordinator) -> ssl.SSLContext:
    with coordinator.keys.key_file() as key:
        return tls_context(
            certificate=coordinator.home.keys / SERVER_CERTIFICATE,
            key=key,
            authority=coordinator.home.keys / AUTHORITY_CERTIFICATE,
        )


def _token(coordinator: Coordinator) -> str:
    path = coordinator.config.dashboard.metrics_token_file
    if path is None:
        return ""
    return read_secret(coordinator.home.root / path, key="dashboard.metrics_token_file").decode()
