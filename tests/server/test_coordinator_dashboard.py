"""The coordinator's own pages and metrics, with people who sign in by password."""

import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from silotune.dashboard.accounts import Accounts
from silotune.server.admin.operations import ACCOUNTS_FILE
from tests.server.monitored import office, tell_round  # noqa: F401 - a fixture

PASSWORD = "correct horse battery"
HTML = {"accept": "text/html"}


@pytest.fixture(scope="module")
def pages(office):  # noqa: F811
    accounts = Accounts(office.home.state / ACCOUNTS_FILE)
    accounts.add("vera", "viewer", PASSWORD)
    accounts.add("olga", "operator", PASSWORD)
    port = office.coordinator.config.dashboard.port
    return f"http://127.0.0.1:{port}"


def signed_in(pages, name):
    client = httpx.Client(base_url=pages, trust_env=False, timeout=30)
    answer = client.post("/signin", data={"name": name, "password": PASSWORD})
    assert answer.status_code == 303
    client.token = re.search(r'name="token" value="([^"]+)"', client.get("/", headers=HTML).text)[1]
    return client


def posts(number="0" * 32):
    return [
        *(f"/runs/demo-1/{action}" for action in ("pause", "resume", "stop")),
        *(f"/enrolments/{number}/{action}" for action in ("approve", "refuse")),
        "/sites/north/revoke",
    ]


def test_a_viewer_can_not_act_and_without_a_token_nobody_can(office, pages):  # noqa: F811
    tell_round(office.told_run(), 1, ["a", "b"])
    vera, olga = signed_in(pages, "vera"), signed_in(pages, "olga")
    for path in posts():
        assert vera.post(path, data={"token": vera.token}).status_code == 403, path
        assert olga.post(path, data={"token": vera.token}).status_code == 403, path
        assert olga.post(path).status_code == 403, path
        assert httpx.post(pages + path, trust_env=False).status_code == 401, path
        crossed = {"origin": "http://evil.example"}
        answer = olga.post(path, data={"token": olga.token}, headers=crossed)
        assert answer.status_code == 403, path
    assert office.coordinator.run_control.runs.get("demo-1")["state"] == "running"
    page = vera.get("/runs/demo-1", headers=HTML).text
    assert "Stop for good" not in page
    tried = [row for row in office.coordinator.operations.actions() if row["who"] == "vera"]
    refused = {(row["action"], row["target"]) for row in tried if row["outcome"] == "ST-625"}
    assert refused == {tuple(reversed(path.split("/")[2:])) for path in posts()}


def test_an_operator_acts_and_is_named_in_the_actions(office, pages):  # noqa: F811
    office.told_run("run-b")
    number = office.asks_to_join("south")
    olga = signed_in(pages, "olga")
    assert olga.post("/runs/run-b/pause", data={"token": olga.token}).status_code == 303
    assert office.coordinator.run_control.runs.get("run-b")["state"] == "paused"
    approved = olga.post(f"/enrolments/{number}/approve", data={"token": olga.token})
    assert approved.status_code == 303
    assert office.coordinator.registrar.is_active("south")
    text = olga.get("/actions", headers=HTML).text
    assert re.search(r"olga</td>.*?pause.*?run-b", text, re.S)
    again = olga.post(f"/enrolments/{number}/approve", data={"token": olga.token})
    assert again.status_code == 409
    assert "ST-622" in again.text


def test_names_and_reasons_from_outside_are_only_text(office, pages):  # noqa: F811
    evil = "<script>alert(1)</script>'; DROP TABLE runs; --"
    record = office.told_run("run-c", purpose=evil)
    record.append_event("plan_rejected", site=evil, reason=evil)
    record.append_event("site_refused", site=evil, code=evil, detail=evil)
    office.coordinator.registrar.refuse(office.asks_to_join("west"), reason=evil)
    olga = signed_in(pages, "olga")
    for path in ("/", "/runs/run-c", "/sites", "/actions", "/compare?run=run-c"):
        answer = olga.get(path, headers=HTML)
        assert answer.status_code == 200
        assert "<script>alert" not in answer.text, path
    for name in (evil, "run-c' OR '1'='1", "run-c%00", "%27"):
        assert olga.get(httpx.URL(pages).join(f"/runs/{name.replace('/', '')}")).status_code == 404
    assert office.coordinator.run_control.runs.get("run-c")["state"] == "running"


def test_alarms_are_on_the_overview_and_told_as_text(office, pages):  # noqa: F811
    office.coordinator.alarm("forged_request", site="north", detail="<script>alert(1)</script>")
    vera = signed_in(pages, "vera")
    assert "1 alarm in the last day" in vera.get("/", headers=HTML).text
    text = vera.get("/actions", headers=HTML).text
    assert "forged_request" in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text


def test_metrics_parse_and_agree_with_the_store(office, pages):  # noqa: F811
    record = office.told_run("run-d", rounds=4)
    for number in (1, 2):
        tell_round(record, number, ["a", "b"], failed=("b",) if number == 2 else ())
    assert httpx.get(f"{pages}/metrics", trust_env=False).status_code == 401
    text = signed_in(pages, "vera").get("/metrics").text
    found = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    run = ("run", "run-d")
    assert found["silotune_run_rounds", run] == 2
    assert found["silotune_run_rounds_planned", run] == 4
    assert found["silotune_site_rounds_total", run, ("site", "a")] == 2
    assert found["silotune_site_rounds_lost_total", run, ("site", "b")] == 1
    assert found["silotune_errors_total", ("code", "ST-603"), run, ("site", "b")] == 1
    assert found["silotune_run_bytes_total", ("direction", "up"), run] == 2 * 4 * 64 * 2


def test_a_round_costs_the_store_less_than_ten_milliseconds_of_work(office):  # noqa: F811
    import time

    record = office.told_run("run-e", rounds=60)
    tell_round(record, 1, ["a", "b", "c"])
    started = time.process_time()
    for number in range(2, 22):
        tell_round(record, number, ["a", "b", "c"])
    spent = (time.process_time() - started) / 20
    print(f"{1000 * spent:.2f} ms of CPU a round, six events and a checkpoint")
    assert spent < 0.05  # all of it: the events alone are measured by the benchmark


def test_the_store_says_that_a_round_is_saved_in_the_transaction_that_saves_it(office):  # noqa: F811
    record = office.told_run("run-f")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "silotune.server.store.runs.RunWriter._write_adapter",
            lambda *_: (_ for _ in ()).throw(OSError("the disk is full")),
        )
        with pytest.raises(OSError, match="full"):
            tell_round(record, 1, ["a", "b"])
    source = office.coordinator.operations.source
    assert "round_saved" not in [row["event"] for row in source.events("run-f")]
    assert record.load_checkpoint() is None
