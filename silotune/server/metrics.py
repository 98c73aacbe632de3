"""Figures for Prometheus, taken from the store and the link state when they are asked for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from silotune.dashboard.spending import Spending, left
from silotune.events.feed import OVER
from silotune.events.source import RunFacts, Views
from silotune.events.view import RunView
from silotune.server.operations import Operations

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
        self.budget = gauge("silotune_epsilon_budget", "The plan's epsilon", labels=run)

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
        if facts.budget is not None:
            self.budget.add_metric([run], facts.budget)
        for name, value in spent.items():
            self.spent.add_metric([run, name], value)
        for name, value in left(facts.budget, spent).items():
            self.left.add_metric([run, name], value)
