"""What people look at beside a running coordinator: the admin API, the pages, metrics, alerts.

Metrics are taken from the store and the link state when Prometheus asks. The pages let people in by
passwords or certificates, over TLS off loopback.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from silotune.dashboard.page_guard import Access
from silotune.dashboard.pages import Content, build
from silotune.dashboard.run_page import Spending, left
from silotune.events.source import OVER, RunFacts, Views
from silotune.events.view import RunView
from silotune.protocol.asgi import LOOPBACK
from silotune.server.admin.operations import CoordinatorParts, Operations
from silotune.server.config import read_secret
from silotune.server.heartbeats import Heartbeats, Periodic
from silotune.server.listener import BrowserProtocol, Listener, bind_public, server_tls

if TYPE_CHECKING:
    from silotune.server.admin.service import ControlServer


class Monitoring:
    """Starts and stops whatever the configuration asks for.

    Parameters
    ----------
    parts : CoordinatorParts
        The coordinator's.
    operations : Operations
        What people may ask of it.
    """

    def __init__(self, parts: CoordinatorParts, operations: Operations) -> None:
        self._parts, self._operations = parts, operations
        heartbeats = Heartbeats(
            operations.sites,
            log=parts.log,
            runs_of=parts.run_control.running_with,
            silent_seconds=parts.config.alerts.silent_seconds,
        )
        self._control: ControlServer | None = None
        self._pages: Listener | None = None
        self._periodic = [Periodic(lambda: heartbeats.look(time.time()), name="heartbeats")]

    def start(self) -> None:
        """Serve. Raises `PortTaken`."""
        config = self._parts.config
        if config.admin.port is not None:
            from silotune.server.admin.service import ControlServer

            host = config.admin.host
            self._control = ControlServer(
                operations=self._operations,
                keys=self._parts.keys,
                host=host,
                port=config.admin.port,
            )
            self._control.start()
            bracketed = f"[{host}]" if ":" in host else host
            self._operations.admin_address = f"{bracketed}:{self._control.port}"
        if config.dashboard.port is not None:
            self._pages = make_dashboard(self._parts, self._operations, port=config.dashboard.port)
            self._pages.start()
        self._add_alerts()
        for periodic in self._periodic:
            periodic.start()

    def _add_alerts(self) -> None:
        from silotune.server.alerts import Alerting, Rules, sinks_of

        parts, source = self._parts, self._operations.source
        sinks = sinks_of(parts.config.alerts, base=parts.home.root)
        if sinks:
            rules = Rules(source, self._operations.sites, parts.config.alerts)
            alerting = Alerting(rules, sinks, store=parts.store, source=source, log=parts.log)
            self._periodic.append(Periodic(alerting.look, name="alerts"))

    def stop(self) -> None:
        """Serve no longer."""
        for periodic in reversed(self._periodic):
            periodic.stop()
        if self._pages is not None:
            self._pages.stop()
        if self._control is not None:
            self._control.stop()


_NEWEST_OVER = 5  # runs that are over, besides all that are not
_STATES = ("proposed", "running", "paused", "finished", "stopped", "failed")


class Metrics(Collector):
    """A collector: each scrape reads what is new since the last, and nothing is kept besides.

    Parameters
    ----------
    operations : Operations
        Runs, sites and requests.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._views, self._spending = Views(operations.source), Spending()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known when they are collected."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every figure, freshly taken."""
        runs = self._operations.source.runs()
        yield from self._of_sites()
        states = Counter(facts.state for facts in runs)
        family = GaugeMetricFamily("silotune_runs", "Runs by state", labels=["state"])
        for state in _STATES:
            family.add_metric([state], states[state])
        yield family
        waiting = sum(row.state == "waiting" for row in self._operations.requests())
        yield GaugeMetricFamily(
            "silotune_enrolments_waiting", "Requests that an operator has to decide", value=waiting
        )
        shown = [f for f in runs if f.state not in OVER]
        shown += [f for f in runs if f.state in OVER][:_NEWEST_OVER]
        yield from self._of_runs(shown)

    def _of_sites(self) -> Iterator[Metric]:
        online = GaugeMetricFamily(
            "silotune_site_online", "Whether a site's heartbeats are current", labels=["site"]
        )
        age = GaugeMetricFamily(
            "silotune_site_heartbeat_age_seconds",
            "Seconds since a site's heartbeats were last current; 0 while they are",
            labels=["site"],
        )
        for site in self._operations.sites():
            if site.status == "active":
                online.add_metric([site.site], float(site.online))
                gone = time.time() - site.last_seen if site.last_seen else 0.0
                age.add_metric([site.site], 0.0 if site.online else max(0.0, gone))
        yield online
        yield age

    def _of_runs(self, shown: list[RunFacts]) -> Iterator[Metric]:
        families = _Families()
        for facts in shown:
            with self._views.lock:
                view = self._views.get(facts.run)
                families.add(facts, view, self._spending.spent(facts, view))
        yield from families.all


class _Families:
    """The figures of runs."""

    def __init__(self) -> None:
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        run, site = ["run"], ["run", "site"]
        self.rounds = gauge("silotune_run_rounds", "Rounds that are durable", labels=run)
        self.planned = gauge("silotune_run_rounds_planned", "Rounds of the plan", labels=run)
        self.active = gauge("silotune_run_active", "1 while the run is running", labels=run)
        self.event = gauge(
            "silotune_run_last_event_timestamp_seconds", "Time of the newest event", labels=run
        )
        self.seconds = gauge(
            "silotune_round_seconds", "Wall time of the newest round", labels=["run", "part"]
        )
        self.bytes = counter(
            "silotune_run_bytes", "Bytes of updates and adapters", labels=["run", "direction"]
        )
        self.pending = gauge(
            "silotune_round_sites", "Sites of the newest round by phase", labels=["run", "phase"]
        )
        self.replies = counter("silotune_site_rounds", "Rounds that counted", labels=site)
        self.lost = counter("silotune_site_rounds_lost", "Rounds lost or late", labels=site)
        self.errors = counter(
            "silotune_errors", "Refusals and failures", labels=["run", "site", "code"]
        )
        self.spent = gauge("silotune_epsilon_spent", "Epsilon spent in the run", labels=site)
        self.left = gauge("silotune_epsilon_left", "What is left of the plan's", labels=site)
        self.planned_epsilon = gauge("silotune_epsilon_budget", "The plan's epsilon", labels=run)

    @property
    def all(self) -> list[Metric]:
        """Every family."""
        return list(vars(self).values())

    def add(self, facts: RunFacts, view: RunView, spent: dict[str, float]) -> None:
        """Take a run in; call it under the view's lock."""
        run = facts.run
        self.rounds.add_metric([run], view.done)
        self.planned.add_metric([run], facts.rounds)
        self.active.add_metric([run], float(facts.state == "running"))
        self.event.add_metric([run], view.last_time or 0.0)
        rounds = view.rounds.values()
        for direction, total in (
            ("up", sum(found.bytes_up for found in rounds)),
            ("down", sum(found.bytes_down for found in rounds)),
        ):
            self.bytes.add_metric([run, direction], total)
        if finished := view.finished_rounds:
            last = finished[-1]
            for part, value in (
                ("all", last.seconds),
                ("waiting", last.wait_seconds),
                ("aggregating", last.aggregate_seconds),
            ):
                self.seconds.add_metric([run, part], value or 0.0)
        if current := view.current:
            for phase, count in Counter(c.phase for c in current.cells.values()).items():
                self.pending.add_metric([run, phase], count)
        for name, site in view.sites.items():
            self.replies.add_metric([run, name], site.replied)
            self.lost.add_metric([run, name], site.failed)
        for (name, code), count in Counter((t.site, t.code) for t in view.troubles).items():
            self.errors.add_metric([run, name, code], count)
        if facts.planned_epsilon is not None:
            self.planned_epsilon.add_metric([run], facts.planned_epsilon)
        for name, value in spent.items():
            self.spent.add_metric([run, name], value)
        for name, value in left(facts.planned_epsilon, spent).items():
            self.left.add_metric([run, name], value)


def make_dashboard(parts: CoordinatorParts, operations: Operations, *, port: int) -> Listener:
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
    config = parts.config.dashboard
    tls = None if config.host in LOOPBACK else server_tls(parts.home, parts.keys)
    names = {*config.hosts, *parts.config.listen.hosts, config.host}
    access = Access(
        hosts=frozenset(names | (LOOPBACK if tls is None else set())),
        tls=tls is not None,
        accounts=operations.accounts,
        holder=operations.holder if tls else None,
        refused=operations.refused,
    )
    content = Content(
        title=parts.config.federation.name,
        source=operations.source,
        operations=operations,
        metrics=Metrics(operations).text,
        metrics_token=_token(parts),
    )
    bound = bind_public(config.host, port)
    return Listener(build(content, access), bound=bound, tls=tls, protocol=BrowserProtocol)


def _token(parts: CoordinatorParts) -> str:
    path = parts.config.dashboard.metrics_token_file
    if path is None:
        return ""
    return read_secret(parts.home.root / path, key="dashboard.metrics_token_file").decode()
