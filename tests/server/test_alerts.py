"""Alerts: what is told, to whom, and that it is told once."""

import hashlib
import hmac
import json
import threading
import time
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import StreamRequestHandler, TCPServer

import pytest

from silotune.events.source import RunFacts, SiteFacts
from silotune.server.alerts import SIGNATURE, Alert, Alerting, Mail, Rules, Webhook
from silotune.server.config import AlertsSection
from silotune.server.store.database import Store
from silotune.server.store.runs import FederationLog
from silotune.trust.vault import AtRest, Vault

PLAN = {"privacy": {"mode": "record", "epsilon": 8.0, "delta": 1e-5}}


class Told:
    """A source of runs whose events are told by hand."""

    def __init__(self):
        self.rows, self.state = {"r": []}, "running"

    def tell(self, kind, *, at=None, **fields):
        row = {"id": len(self.rows["r"]) + 1, "time": at or time.time(), "event": kind, **fields}
        self.rows["r"].append(row)

    def runs(self):
        return [self.facts("r")]

    def facts(self, run):
        named = {"name": run, "purpose": "", "round": 0, "rounds": 10, "proposed_at": 0.0}
        return RunFacts(run=run, state=self.state, plan=PLAN, **named)

    def events(self, run, *, after=0, limit=100_000):
        return [row for row in self.rows[run] if row["id"] > after]


@pytest.fixture
def store(tmp_path):
    vault = Vault(tmp_path / "keys", AtRest(), base=tmp_path)
    made = Store(f"sqlite:///{tmp_path / 'store.sqlite'}", vault=vault)
    yield made
    made.close()


@pytest.fixture
def source():
    return Told()


def alerting(source, store, *sinks, sites=(), **config):
    rules = Rules(source, lambda: sites, AlertsSection(**config))
    log = FederationLog(store, on_event=lambda: None)
    return Alerting(rules, sinks, store=store, source=source, log=log)


def kinds(alerts):
    return [(alert.kind, alert.site) for alert in alerts]


def test_each_kind_of_event_that_matters_is_told_with_a_remedy(source, store):
    source.tell("run_started", sites=["a", "b"])
    source.tell("site_refused", site="b", code="ST-401")
    source.tell("plan_rejected", site="c", reason="not now")
    source.tell("round_finished", round=1, anomaly={"a": 9.5, "b": 1.0, "c": None})
    source.tell("run_failed", code="ST-601")
    told = []
    alerting(source, store, told.append).look()
    assert kinds(told) == [
        ("site_refused", "b"),
        ("site_refused", "c"),
        ("anomaly_high", "a"),
        ("run_failed", ""),
    ]
    assert "Lower privacy.epsilon" in told[0].text


def test_nothing_is_told_twice_also_not_by_the_next_process(source, store):
    source.tell("run_started", sites=["a"])
    source.tell("run_finished", rounds=1)
    told = []
    first = alerting(source, store, told.append)
    first.look()
    first.look()
    alerting(source, store, told.append).look()
    assert kinds(told) == [("run_finished", "")]


def test_what_could_not_be_delivered_is_tried_again_in_order(source, store):
    source.tell("site_refused", site="a", code="ST-401")
    source.tell("run_finished", rounds=1)
    told, broken = [], [True]

    def sink(alert):
        if broken[0]:
            raise ConnectionError
        told.append(alert)

    watching = alerting(source, store, sink)
    watching.look()
    assert told == []
    broken[0] = False
    watching.look()
    assert kinds(told) == [("site_refused", "a"), ("run_finished", "")]


def test_a_run_in_which_nothing_happens_is_stuck_once(source, store):
    source.tell("round_started", round=1, cohort=["a"], at=time.time() - 100)
    told = []
    watching = alerting(source, store, told.append, stuck_seconds=60)
    watching.look()
    watching.look()
    assert kinds(told) == [("run_stuck", "")]
    patient = []
    alerting(source, store, patient.append, stuck_seconds=600).look()
    assert patient == []


def test_a_run_that_is_paused_or_over_is_not_stuck(source, store):
    source.tell("run_paused", at=time.time() - 100)
    for state in ("paused", "finished", "stopped"):
        source.state, told = state, []
        alerting(source, store, told.append, stuck_seconds=60).look()
        assert told == []


def test_a_silent_site_and_a_small_budget_are_told(source, store):
    gone = SiteFacts(site="a", status="active", online=False, last_seen=time.time() - 400, words="")
    fresh = SiteFacts(site="b", status="active", online=True, last_seen=time.time(), words="")
    left = SiteFacts(site="c", status="revoked", online=False, last_seen=1.0, words="")
    source.tell("round_started", round=1, cohort=["a", "b"])
    source.tell("round_finished", round=1, epsilon={"a": 7.3, "b": 7.1})
    told = []
    alerting(source, store, told.append, sites=[gone, fresh, left]).look()
    assert sorted(kinds(told)) == [("budget_low", "a"), ("site_silent", "a")]


def test_an_alarm_and_a_request_to_be_enrolled_are_told(source, store):
    log = FederationLog(store, on_event=lambda: None)
    log.append("enrolment_requested", site="west", words="one two three four five six")
    log.append("operator_action", who="olga", role="operator", action="sign_in")
    log.append("alarm", kind="reply_not_trusted", site="east", detail="the signature is wrong")
    told = []
    watching = alerting(source, store, told.append)
    watching.look()
    watching.look()
    assert kinds(told) == [("enrolment_waits", "west"), ("alarm", "east")]
    assert "one two three four five six" in told[0].text
    assert "the signature is wrong" in told[1].text


ALERT = Alert(key="k", kind="run_finished", text="Run r is finished.", time=1.0, run="r")


def test_a_webhook_gets_json_that_the_shared_key_signed():
    got = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((dict(self.headers), body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        Webhook(f"http://127.0.0.1:{server.server_port}/x", secret=b"shared")(ALERT)
        thread.join(timeout=10)
    headers, body = got[0]
    assert json.loads(body)["text"] == "Run r is finished."
    expected = hmac.new(b"shared", body, hashlib.sha256).hexdigest()
    assert {k.lower(): v for k, v in headers.items()}[SIGNATURE] == f"sha256={expected}"


def test_mail_is_sent_by_smtp():
    received = []

    class Server(StreamRequestHandler):
        """Just enough of RFC 5321."""

        def handle(self):
            self.wfile.write(b"220 here\r\n")
            while line := self.rfile.readline():
                word = line.split()[0].upper()
                if word == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    lines = iter(self.rfile.readline, b".\r\n")
                    received.append(b"".join(lines))
                self.wfile.write(b"250 fine\r\n" if word != b"QUIT" else b"221 bye\r\n")
                if word == b"QUIT":
                    return

    with TCPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        config = AlertsSection(
            smtp_host="127.0.0.1",
            smtp_port=server.server_address[1],
            smtp_starttls=False,
            mail_from="silotune@example.org",
            mail_to=("ops@example.org",),
        )
        Mail(config, password="")(ALERT)
        thread.join(timeout=10)
    message = message_from_bytes(received[0])
    assert message["Subject"] == "silotune: run_finished r"
    assert "Run r is finished." in message.get_payload()
