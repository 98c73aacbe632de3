"""Alerts: what somebody should know without looking, sent once each to signed webhooks and by e-mail.

Rules look at the same events and views as the pages. What was told is remembered by where in the events
it came from: after a restart nothing is told again, and nothing that happened meanwhile is left out.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import smtplib
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Literal

import httpx
from sqlalchemy import delete, insert, select

from silotune.dashboard.run_page import Spending, left
from silotune.errors import catalogue
from silotune.events import schema
from silotune.events.source import OVER, Readable, RunFacts, SiteFacts, Source, Views
from silotune.server.config import AlertsSection, read_secret
from silotune.server.store.database import CURSORS, Store

_log = logging.getLogger(__name__)

Kind = Literal[
    "run_finished",
    "run_failed",
    "run_stuck",
    "site_silent",
    "site_refused",
    "budget_low",
    "anomaly_high",
    "alarm",
    "enrolment_waits",
]

_LOW = 0.1  # of the plan's epsilon
_READER = "alerts"


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something to tell.

    Attributes
    ----------
    key : str
        The same for the same thing: it is told once.
    kind : str
        Which rule.
    text : str
        One sentence for people, with the remedy where there is one.
    time : float
        Unix time.
    run, site : str
        What it is about; empty where it is about neither.
    event : mapping or None
        The event behind it (docs/events.md), if it is one.
    """

    key: str
    kind: Kind
    text: str
    time: float
    run: str = ""
    site: str = ""
    event: Mapping[str, Any] | None = None


Sink = Callable[[Alert], None]


class Rules:
    """Alerts from events and views; pure, but for reading.

    Parameters
    ----------
    source : Source
        Runs.
    sites : callable
        The sites as they are now.
    config : AlertsSection
        Thresholds.
    """

    def __init__(
        self, source: Source, sites: Callable[[], Sequence[SiteFacts]], config: AlertsSection
    ) -> None:
        self._source, self._sites, self._config = source, sites, config
        self._views, self._spending = Views(source), Spending()

    def of_events(self, run: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Alert]:
        """What these events of a run call for."""
        for row in rows:
            event = schema.parse(row)
            match event:
                case schema.RunFinished():
                    yield self._of(event, run, "run_finished", f"Run {run} is finished.")
                case schema.RunFailed():
                    words = f"Run {run} failed: {_explained(event.code)}"
                    yield self._of(event, run, "run_failed", words)
                case schema.SiteRefused():
                    words = f"{event.site} refused run {run}: {_explained(event.code)}"
                    yield self._of(event, run, "site_refused", words, site=event.site)
                case schema.PlanRejected():
                    words = f"{event.site} rejected the plan of run {run}: {event.reason or 'no reason'}"
                    yield self._of(event, run, "site_refused", words, site=event.site)
                case schema.Alarm():
                    words = f"Alarm: {event.kind} by {event.site or 'nobody known'}. {event.detail}"
                    more = " Only an attack or a mistake explains it: see the audit log."
                    yield self._of(event, run, "alarm", words.rstrip() + more, site=event.site)
                case schema.EnrolmentRequested():
                    words = (
                        f"{event.site} asks to be enrolled. Compare the six words with its team: "
                        f"{event.words}."
                    )
                    yield self._of(event, run, "enrolment_waits", words, site=event.site)
                case schema.RoundFinished():
                    yield from self._anomalies(event, run)

    def _anomalies(self, event: schema.RoundFinished, run: str) -> Iterator[Alert]:
        for site, score in event.anomaly.items():
            if (score or 0.0) > self._config.anomaly:
                words = (
                    f"The update of {site} in round {event.round} of run {run} is unlike the others "
                    f"in size (score {score:.1f}). Look at it before you go on."
                )
                yield self._of(event, run, "anomaly_high", words, site=site)

    def of_states(self, now: float) -> Iterator[Alert]:
        """What has lasted too long, or is nearly used up."""
        for facts in self._source.runs():
            if facts.state not in OVER:
                yield from self._of_run(facts, now)
        for site in self._sites():
            seen = site.last_seen
            if site.status != "active" or site.online or not seen:
                continue
            if now - seen > self._config.silent_seconds:
                yield Alert(
                    key=f"silent {site.site} {seen:.0f}",
                    kind="site_silent",
                    text=f"{site.site} has sent no sign of life for {(now - seen) / 60:.0f} minutes. "
                    "Ask its team whether the daemon runs: `silotune site status`.",
                    time=now,
                    site=site.site,
                )

    def _of_run(self, facts: RunFacts, now: float) -> Iterator[Alert]:
        with self._views.lock:
            view = self._views.get(facts.run)
            last, number = view.last_time, view.last_id
            remains = left(facts.planned_epsilon, self._spending.spent(facts, view))
        stuck = last is not None and now - last > self._config.stuck_seconds
        if facts.state == "running" and stuck and last is not None:
            yield Alert(
                key=f"stuck {facts.run} {number}",
                kind="run_stuck",
                text=f"Nothing has happened in run {facts.run} for {(now - last) / 60:.0f} minutes. "
                "See which sites it waits for.",
                time=now,
                run=facts.run,
            )
        for site, value in remains.items():
            if facts.planned_epsilon and value < _LOW * facts.planned_epsilon:
                yield Alert(
                    key=f"budget {facts.run} {site}",
                    kind="budget_low",
                    text=f"{site} has less than a tenth of the epsilon of run {facts.run} left: "
                    f"{value:.2f} of {facts.planned_epsilon:g}.",
                    time=now,
                    run=facts.run,
                    site=site,
                )

    @staticmethod
    def _of(event: schema.Event, run: str, kind: Kind, text: str, *, site: str = "") -> Alert:
        return Alert(
            key=f"event {event.id}",
            kind=kind,
            text=text,
            time=event.time,
            run=run,
            site=site,
            event=event.as_dict(),
        )


class Alerting:
    """Tells every sink what is new and what lasts, at each `look`.

    Parameters
    ----------
    rules : Rules
        What is worth telling.
    sinks : sequence of callables
        Each is told; one that fails is logged and tried again at the next look.
    store : Store
        Remembers how far the events were told.
    source : Source
        Runs.
    log : Readable
        The federation's own events.
    """

    def __init__(
        self, rules: Rules, sinks: Sequence[Sink], *, store: Store, source: Source, log: Readable
    ) -> None:
        self._rules, self._sinks, self._store = rules, sinks, store
        self._source, self._log = source, log
        self._told: set[str] = set()

    def look(self) -> None:
        """One look at everything: events in their order, and then what lasts."""
        if not self._look_at("", self._log):
            return
        for facts in self._source.runs():
            if not self._look_at(facts.run, self._source):
                return
        for alert in self._rules.of_states(time.time()):
            if alert.key not in self._told and self._tell(alert):
                self._told.add(alert.key)

    def _look_at(self, run: str, source: Readable) -> bool:
        """Tell of new events in their order; False if one could not be told: what is behind waits."""
        rows = source.events(run, after=self._cursor(run))
        for alert in self._rules.of_events(run, rows):
            if not self._tell(alert):
                return False
            self._move(run, int((alert.event or {})["id"]))
        if rows:
            self._move(run, int(rows[-1]["id"]))
        return True

    def _tell(self, alert: Alert) -> bool:
        good = True
        for sink in self._sinks:
            try:
                sink(alert)
            except Exception as exc:
                _log.warning("alert %s was not delivered: %s", alert.kind, type(exc).__name__)
                good = False
        return good

    def _cursor(self, run: str) -> int:
        query = select(CURSORS.c.event).where(CURSORS.c.reader == _reader(run))
        with self._store.transaction() as connection:
            return int(connection.execute(query).scalar() or 0)

    def _move(self, run: str, event: int) -> None:
        row = {"reader": _reader(run), "event": event}
        with self._store.transaction() as connection:
            connection.execute(delete(CURSORS).where(CURSORS.c.reader == row["reader"]))
            connection.execute(insert(CURSORS).values(row))


def _reader(run: str) -> str:
    """A cursor's name, within its column's 63 characters."""
    return f"{_READER} {hashlib.sha256(run.encode()).hexdigest()[:48]}"


def _explained(code: str) -> str:
    """A code with its title and what to do."""
    error = next((found for found in catalogue() if found.code == code), None)
    return f"{code} {error.title}. {error.advice}" if error else code


_SECONDS = 10.0

SIGNATURE = "silotune-signature"
"""Header of a webhook: ``sha256=`` and the HMAC-SHA256 of the body under the shared key, in hex."""


class Webhook:
    """POSTs an alert as JSON; any answer but 2xx is a failure.

    Parameters
    ----------
    url : str
        Where to.
    secret : bytes
        Key of the signature; empty for none.
    """

    def __init__(self, url: str, *, secret: bytes) -> None:
        self._url, self._secret = url, secret

    def __call__(self, alert: Alert) -> None:
        """Tell. Raises `httpx.HTTPError`."""
        # The redirect of a hook could lead anywhere, so none is followed.
        body = json.dumps(asdict(alert), sort_keys=True).encode()
        headers = {"content-type": "application/json", "user-agent": "silotune"}
        if self._secret:
            digest = hmac.new(self._secret, body, hashlib.sha256).hexdigest()
            headers[SIGNATURE] = f"sha256={digest}"
        httpx.post(self._url, content=body, headers=headers, timeout=_SECONDS).raise_for_status()


class Mail:
    """Sends an alert through an SMTP server, over TLS unless the configuration says otherwise."""

    def __init__(self, config: AlertsSection, *, password: str) -> None:
        self._config, self._password = config, password

    def __call__(self, alert: Alert) -> None:
        """Tell. Raises `smtplib.SMTPException` or `OSError`."""
        config, message = self._config, EmailMessage()
        # Header values are made of our own words: names of runs and sites have no line breaks.
        message["Subject"] = " ".join(f"silotune: {alert.kind} {alert.run or alert.site}".split())
        message["From"], message["To"] = config.mail_from, ", ".join(config.mail_to)
        message.set_content(alert.text + "\n")
        with smtplib.SMTP(config.smtp_host, config.smtp_port, timeout=_SECONDS) as server:
            if config.smtp_starttls:
                server.starttls(context=ssl.create_default_context())
            if config.smtp_user:
                server.login(config.smtp_user, self._password)
            server.send_message(message)


def sinks_of(config: AlertsSection, *, base: Path) -> list[Sink]:
    """Everybody whom the configuration names. Raises `CoordinatorConfigInvalid`."""
    secret = b""
    if config.webhook_secret_file is not None:
        secret = read_secret(base / config.webhook_secret_file, key="alerts.webhook_secret_file")
    found: list[Sink] = [Webhook(url, secret=secret) for url in config.webhooks]
    if config.smtp_host and config.mail_to:
        password = ""
        if config.smtp_password_file is not None:
            path = base / config.smtp_password_file
            password = read_secret(path, key="alerts.smtp_password_file").decode()
        found.append(Mail(config, password=password))
    return found
