"""What people look at beside a running coordinator: the admin API, the pages, the alerts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from silotune.server.heartbeats import Heartbeats
from silotune.server.lookout import Lookout
from silotune.server.operations import Operations
from silotune.server.people import People

if TYPE_CHECKING:
    from silotune.server.control import ControlServer
    from silotune.server.coordinator import Coordinator
    from silotune.server.listener import Listener


class Monitoring:
    """Starts and stops whatever the configuration asks for.

    Parameters
    ----------
    coordinator : Coordinator
        Whose.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.people = People(coordinator.store)
        self.operations = Operations(
            store=coordinator.store,
            conductor=coordinator.conductor,
            registrar=coordinator.registrar,
            books=coordinator.books,
            link=coordinator.link,
            audit=coordinator.audit,
            log=coordinator.log,
        )
        heartbeats = Heartbeats(
            self.operations.sites,
            log=coordinator.log,
            runs_of=coordinator.conductor.running_with,
            silent_seconds=coordinator.config.alerts.silent_seconds,
        )
        self._control: ControlServer | None = None
        self._pages: Listener | None = None
        self._lookouts = [Lookout(lambda: heartbeats.look(time.time()), name="heartbeats")]

    @property
    def control_address(self) -> str:
        """``host:port`` of the admin API; empty if there is none."""
        if self._control is None:
            return ""
        host = self._coordinator.config.admin.host
        return f"{f'[{host}]' if ':' in host else host}:{self._control.port}"

    def start(self) -> None:
        """Serve. Raises `PortTaken`."""
        config = self._coordinator.config
        if config.admin.port is not None:
            from silotune.server.control import ControlServer

            self._control = ControlServer(
                operations=self.operations,
                people=self.people,
                keys=self._coordinator.keys,
                host=config.admin.host,
                port=config.admin.port,
            )
            self._control.start()
        if config.dashboard.port is not None:
            from silotune.server.dashboard import make_dashboard

            self._pages = make_dashboard(self._coordinator, self, port=config.dashboard.port)
            self._pages.start()
        self._add_alerts()
        for lookout in self._lookouts:
            lookout.start()

    def _add_alerts(self) -> None:
        from silotune.server.alert_sinks import sinks_of
        from silotune.server.alerts import Alerting, Rules

        coordinator, source = self._coordinator, self.operations.source
        sinks = sinks_of(coordinator.config.alerts, base=coordinator.home.root)
        if sinks:
            rules = Rules(source, self.operations.sites, coordinator.config.alerts)
            alerting = Alerting(
                rules, sinks, store=coordinator.store, source=source, log=coordinator.log
            )
            self._lookouts.append(Lookout(alerting.look, name="alerts"))

    def stop(self) -> None:
        """Serve no longer."""
        for lookout in reversed(self._lookouts):
            lookout.stop()
        if self._pages is not None:
            self._pages.stop()
        if self._control is not None:
            self._control.stop()
