"""Claims about the federation's own events: requests, people, alarms, who is silent and who is back."""

import json
import threading
import time

import pytest
from sqlalchemy import create_engine, text

from silotune.events.schema import KINDS, kind_of, parse
from silotune.events.source import SiteFacts
from silotune.events.view import RunView
from silotune.server.heartbeats import Heartbeats
from silotune.server.store.database import migrate
from silotune.server.store.runs import FederationLog
from silotune.trust.identity import Person
from tests.server.monitored import office, tell_round
from tests.server.store.test_store import store

__all__ = ["office", "store"]

OLGA, VERA = Person(name="olga", role="operator"), Person(name="vera", role="viewer")


def told(office, kind, *, after=0):
    return [row for row in office.coordinator.log.events("", after=after) if row["event"] == kind]


def test_a_request_is_told_with_the_words_that_the_page_shows(office):
    office.asks_to_join("south")
    row = told(office, "enrolment_requested")[-1]
    shown = office.coordinator.operations.requests()[0]
    assert (row["site"], row["words"]) == ("south", shown.words)


def test_the_same_request_again_is_told_once(office):
    registrar = office.coordinator.registrar
    before = len(told(office, "enrolment_requested"))
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        real = registrar.enrol
        patch.setattr(registrar, "enrol", lambda request: asked.append(request) or real(request))
        office.asks_to_join("west")
    registrar.enrol(asked[0])
    assert len(told(office, "enrolment_requested")) == before + 1


def test_what_people_do_is_told_in_the_run_it_is_about_or_else_in_the_federation(office):
    office.told_run("run-o")
    operations = office.coordinator.operations
    operations.pause(OLGA, "run-o")
    with pytest.raises(Exception, match="viewer"):
        operations.stop(VERA, "run-o")
    with pytest.raises(Exception, match="ST-"):
        operations.stop(OLGA, "'; DROP TABLE events; --")
    rows = [r for r in operations.source.events("run-o") if r["event"] == "operator_action"]
    assert [(r["who"], r["action"], r["outcome"]) for r in rows] == [
        ("olga", "pause", "done"),
        ("vera", "stop", "ST-625"),
    ]
    last = told(office, "operator_action")[-1]
    assert (last["who"], last["target"]) == ("olga", "'; DROP TABLE events; --")
    assert last["outcome"].startswith("ST-")


def test_an_alarm_is_told_once_a_minute_and_shown_to_people(office):
    for _ in range(3):
        office.coordinator.alarm("reply_not_trusted", site="north", detail="<b>wrong</b>")
    (row,) = told(office, "alarm")
    assert (row["kind"], row["site"], row["detail"]) == (
        "reply_not_trusted",
        "north",
        "<b>wrong</b>",
    )
    assert office.coordinator.operations.alarms() == [row]


def test_a_watcher_of_the_federation_gets_what_happens_from_then_on(office):
    client, seen = office.client("walter", "viewer"), []
    last = office.coordinator.log.events("")[-1]["id"]

    def watch():
        for event in client.watch("", after=last):
            seen.append(event)
            if event["event"] == "alarm":
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    office.asks_to_join("northwest")
    office.coordinator.alarm("second_session", site="east")
    thread.join(timeout=20)
    assert [event["event"] for event in seen] == ["enrolment_requested", "alarm"]
    assert seen == office.coordinator.log.events("", after=last)


class Scene:
    """Sites whose heartbeats are set by hand, and a run that two of them are in."""

    def __init__(self, store):
        self.rows, self.run = {}, []
        self.log = FederationLog(store, on_event=lambda: None)

    def set(self, site, *, online, seen, status="active"):
        self.rows[site] = SiteFacts(
            site=site, status=status, online=online, last_seen=seen, words=""
        )

    def heartbeats(self):
        def runs_of(site):
            return [lambda kind, **fields: self.run.append((kind, fields["site"]))]

        return Heartbeats(
            lambda: list(self.rows.values()), log=self.log, runs_of=runs_of, silent_seconds=60.0
        )

    def told(self):
        return [(row["event"], row["site"]) for row in self.log.events("")]


def test_silence_and_return_are_told_once_each_also_by_the_next_process(store):
    scene = Scene(store)
    scene.set("a", online=True, seen=1000.0)
    scene.set("b", online=False, seen=950.0)  # not for long enough
    scene.set("c", online=False, seen=None)  # never there
    scene.set("d", online=False, seen=1.0, status="revoked")
    first = scene.heartbeats()
    first.look(1000.0)
    assert scene.told() == []
    scene.set("a", online=False, seen=1000.0)
    for _ in range(3):
        first.look(1061.0)
    assert sorted(scene.told()) == [("site_silent", "a"), ("site_silent", "b")]
    second = scene.heartbeats()
    second.look(1100.0)
    assert len(scene.told()) == 2
    scene.set("a", online=True, seen=1100.0)
    second.look(1101.0)
    second.look(1102.0)
    assert scene.told()[2:] == [("site_back", "a")]
    assert scene.run == scene.told()  # the runs hear the same
    (silent,) = [row for row in scene.log.events("") if row["event"] == "site_silent"][:1]
    assert silent["seconds"] > 60.0


def test_a_silent_site_is_shown_so_in_its_run_and_again_as_joined(office):
    record = office.told_run("run-s")
    tell_round(record, 1, ["a", "b"])
    view = RunView("run-s")
    record.append_event("site_silent", site="a", seconds=400.0)
    view.extend(office.coordinator.operations.source.events("run-s"))
    assert view.sites["a"].state == "silent"
    record.append_event("site_back", site="a")
    source = office.coordinator.operations.source
    view.extend(source.events("run-s", after=view.last_id))
    assert view.sites["a"].state == "joined"


def test_events_of_an_older_store_survive_the_migration(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'old.sqlite'}")
    with engine.begin() as connection:
        migrate(connection, to="0002")
        connection.execute(
            text(
                "INSERT INTO runs (run, plan, plan_sha256, plan_name, rounds, quorum, state, round,"
                " proposed_at) VALUES ('r', '', '', '', 1, 1, 'running', 0, 1.0)"
            )
        )
        fields = json.dumps({"round": 7, "cohort": ["a"]})
        for number in (3, 9):
            connection.execute(
                text("INSERT INTO events VALUES (:id, 'r', :time, 'round_started', :fields)"),
                {"id": number, "time": time.time(), "fields": fields},
            )
    with engine.begin() as connection:
        migrate(connection)
        rows = connection.execute(text("SELECT id, run, fields FROM events ORDER BY id")).all()
    assert [(row.id, row.run, row.fields) for row in rows] == [(3, "r", fields), (9, "r", fields)]


def test_every_kind_of_the_schema_is_told_by_somebody():
    """A kind that nobody tells is a promise that is not kept."""
    from pathlib import Path

    package = Path(__file__).parents[3] / "silotune"
    code = "".join(
        path.read_text()
        for path in package.rglob("*.py")
        if path.name not in {"schema.py", "view.py"}
    )
    decided = {"plan_approved", "plan_rejected"}  # told as f"plan_{verdict}"
    untold = {kind_of(model) for model in KINDS if f'"{kind_of(model)}"' not in code} - decided
    assert untold == set()
    assert parse({"time": 1.0, "event": "plan_approved", "site": "a"}).event == "plan_approved"
