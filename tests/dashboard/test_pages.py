"""The pages over run directories: what they show, and what they let nobody do."""

import json
import re
import time

import pytest

from silotune.dashboard.accounts import Accounts
from silotune.dashboard.page_guard import HEADERS
from silotune.dashboard.pages import Templates
from silotune.events.source import RunDirectories
from silotune.rounds.run_directory import RunDirectory
from tests.dashboard.browsing import HTML, browser, of
from tests.golden.registry import GOLDEN
from tests.simulation.synthetic_run import VARIANTS, Synthetic


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return Synthetic(rounds=20).write(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def client(run_dir):
    return browser(of(RunDirectories(run_dir)))


def pages_of(run):
    paths = ["/", f"/runs/{run}", f"/runs/{run}/live", f"/runs/{run}/stream", "/compare"]
    return [*paths, f"/runs/{run}/files/plan.toml", "/metrics"]


def test_the_run_page_shows_what_the_events_say(client, run_dir):
    text = client.get(f"/runs/{run_dir.name}", headers=HTML).text
    assert "20 of 20" in text
    assert "Orthopaedics: The privacy budget does not allow this" in text
    assert "Lower privacy.epsilon" in text  # the remedy
    lanes = re.findall(r'<svg class="lane".*?</svg>', text, re.S)
    assert len(lanes) == 7
    # One site refused; each other has a cell each round.
    cells = [len(re.findall(r"M\d+ 0h", lane)) for lane in lanes]
    assert sorted(cells) == [0, 20, 20, 20, 20, 20, 20]


def test_the_page_follows_a_run_that_goes_on(tmp_path):
    root = Synthetic(stop_after=5, faults=False).write(tmp_path)
    client = browser(of(RunDirectories(root)))
    before = client.get(f"/runs/{root.name}/live").json()
    RunDirectory.open(root).append_event("round_finished", round=6, seconds=1.0)
    after = client.get(f"/runs/{root.name}/live").json()
    assert "5 of 72" in before["sections"]["head"]
    assert "6 of 72" in after["sections"]["head"]
    assert after["id"] == before["id"] + 1


def test_a_site_whose_update_is_unlike_the_others_is_named(tmp_path):
    root = Synthetic(stop_after=5, faults=False).write(tmp_path)
    client = browser(of(RunDirectories(root)))
    told = {"Orthopaedics": 9.4, "Eye & ENT": 1.0, "Neuro & mental": None}
    RunDirectory.open(root).append_event("round_started", round=6, cohort=list(told))
    RunDirectory.open(root).append_event("round_finished", round=6, anomaly=told)
    head = client.get(f"/runs/{root.name}/live").json()["sections"]["head"]
    assert "Unlike the others in size, in the newest round: Orthopaedics (9.4)" in head


def test_the_stream_goes_on_behind_the_last_event_that_was_seen(client, run_dir):
    events = RunDirectory.open(run_dir).events.read()
    last = len(events) - 3
    with client.stream(
        "GET", f"/runs/{run_dir.name}/stream", headers={"last-event-id": str(last)}
    ) as answer:
        text = "".join(answer.iter_text())
    told = [json.loads(line[6:]) for line in text.splitlines() if line.startswith('data: {"')]
    assert [row["id"] for row in told] == [last + 1, last + 2, last + 3]
    assert text.rstrip().endswith("data: {}")  # the run is over: the browser need not come again


def test_without_a_sign_in_nothing_is_shown(run_dir):
    client = browser(of(RunDirectories(run_dir)), signed_in=False)
    for path in pages_of(run_dir.name):
        answer = client.get(path)
        assert answer.status_code == 401, path
        assert run_dir.name not in answer.text
        assert client.get(path, headers=HTML).status_code in {303, 401}
    assert client.get("/signin").status_code == 200
    assert client.get("/signin", params={"link": "x" * 43}).status_code == 401


def test_every_answer_has_the_security_headers(client, run_dir):
    for path in [*pages_of(run_dir.name), "/signin", "/static/dashboard.css", "/nowhere"]:
        answer = client.get(path)
        for name, value in HEADERS.items():
            assert answer.headers[name] == value, (path, name)
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_no_page_has_a_style_attribute_or_a_script_of_its_own(client, run_dir):
    # The content policy would stop them; a page that needs them would be broken.
    for path in ("/", f"/runs/{run_dir.name}", "/compare", "/signin"):
        text = client.get(path, headers=HTML).text
        assert not re.search(r"\sstyle=|<style|\son\w+=|javascript:", text), path
        assert re.findall(r"<script[^>]*>", text) == ['<script src="/static/dashboard.js" defer>']
        assert not re.findall(r'(?:src|href)="(?!/|#)', text)


def test_a_forged_host_is_turned_away(client):
    answer = client.get("/", headers={**HTML, "host": "evil.example"})
    assert answer.status_code == 421


def test_a_cookie_can_not_be_read_by_scripts_nor_sent_by_other_sites(run_dir):
    client = browser(of(RunDirectories(run_dir)), signed_in=False)
    answer = client.get("/signin", params={"link": client.access.link.secret})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_signing_out_needs_the_token_and_ends_the_session(client):
    assert client.post("/signout", data={"token": "wrong"}).status_code == 403
    assert client.get("/").status_code == 200
    assert client.post("/signout", data={"token": client.token}).status_code == 303
    assert client.get("/").status_code == 401


def test_passwords_are_braked_for_the_account_and_the_address(tmp_path, run_dir):
    accounts = Accounts(tmp_path / "accounts.json")
    accounts.add("vera", "viewer", "correct horse battery")
    client = browser(of(RunDirectories(run_dir)), signed_in=False, accounts=accounts)
    statuses = [
        client.post("/signin", data={"name": "vera", "password": f"guess {i}"}).status_code
        for i in range(7)
    ]
    assert statuses == [401] * 5 + [429] * 2
    right = client.post("/signin", data={"name": "vera", "password": "correct horse battery"})
    assert right.status_code == 429


def test_a_right_password_signs_in(tmp_path, run_dir):
    accounts = Accounts(tmp_path / "accounts.json")
    accounts.add("vera", "viewer", "correct horse battery")
    client = browser(of(RunDirectories(run_dir)), signed_in=False, accounts=accounts)
    form = {"name": "vera", "password": "correct horse battery"}
    assert client.post("/signin", data=form).headers["location"] == "/"
    assert "vera, viewer" in client.get("/", headers=HTML).text
    crossed = client.post("/signin", data=form, headers={"origin": "http://evil.example"})
    assert crossed.status_code == 403


@pytest.mark.parametrize(
    "name", ["../plan.toml", "..%2Fplan.toml", "checkpoint.safetensors", "%00"]
)
def test_files_that_are_not_offered_are_not_given(client, run_dir, name):
    answer = client.get(f"/runs/{run_dir.name}/files/{name}")
    assert answer.status_code in {401, 404}
    assert b"safetensors" not in answer.content[:20]


def test_a_download_is_never_shown_in_the_page(client, run_dir):
    answer = client.get(f"/runs/{run_dir.name}/files/plan.toml")
    assert answer.content == (run_dir / "plan.toml").read_bytes()
    assert answer.headers["content-disposition"].startswith("attachment")


def test_the_page_of_a_statistics_run_shows_its_figures_and_no_label_breaks_out(tmp_path):
    root = Synthetic(stop_after=5, faults=False).write(tmp_path)
    found = json.loads((GOLDEN / "statistics.json").read_text())
    found["labels"][0]["label"] = "<img src=x>"
    RunDirectory.open(root).append_event("statistics", found=found)
    text = browser(of(RunDirectories(root))).get(f"/runs/{root.name}", headers=HTML).text
    assert "What was counted" in text
    for row in (*found["labels"], *found["lengths"]["bins"], *found["numbers"]["age"]["bins"]):
        shown = row["share"]
        assert (f"{shown['low']:.1%} to {shown['high']:.1%}" if shown else "under ") in text
    assert "&lt;img src=x&gt;" in text
    assert "<img" not in text


def test_figures_of_another_version_are_left_alone(tmp_path):
    root = Synthetic(stop_after=5, faults=False).write(tmp_path)
    RunDirectory.open(root).append_event("statistics", found={"format": "silotune statistics 9"})
    answer = browser(of(RunDirectories(root))).get(f"/runs/{root.name}", headers=HTML)
    assert answer.status_code == 200
    assert "What was counted" not in answer.text


def test_names_from_outside_can_not_break_out_of_the_page(tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    root = Synthetic(**VARIANTS["hostile"], rounds=4, stop_after=3).write(tmp_path)
    run = RunDirectory.open(root)
    run.append_event("site_failed", round=3, site=evil, code=evil, detail=evil)
    resolved = run.read_json("resolved.json")
    resolved["plan"]["plan"]["purpose"] = evil
    run.write_json("resolved.json", resolved)
    client = browser(of(RunDirectories(root)))
    for path in ("/", f"/runs/{root.name}", f"/compare?run={root.name}"):
        text = client.get(path, headers=HTML).text
        assert "<script>alert" not in text, path
        assert "<img" not in text
        assert "&lt;script&gt;alert(1)" in text or path.startswith("/compare")
    sections = client.get(f"/runs/{root.name}/live").json()["sections"]
    assert not any("<script>" in html or "<img" in html for html in sections.values())


def test_a_large_form_is_refused(client):
    assert client.post("/signout", content=b"a" * 70_000).status_code == 413


def test_a_dead_session_ends_its_stream(client, run_dir):
    client.access.sessions.end(client.cookies["silotune"])
    assert client.get(f"/runs/{run_dir.name}/stream").status_code == 401


def test_two_runs_are_compared_by_what_differs(tmp_path):
    one, two = (Synthetic(rounds=n, faults=False).write(tmp_path) for n in (8, 12))
    client = browser(of(RunDirectories(tmp_path)))
    text = client.get("/compare", params={"run": [one.name, two.name]}, headers=HTML).text
    row = re.search(r"<code>rounds.number</code></th><td[^>]*>(\d+)</td><td[^>]*>(\d+)</td>", text)
    assert row.groups() == ("8", "12")


def test_fifty_sites_and_two_hundred_rounds_open_quickly(tmp_path):
    sites = {f"site-{i:02d}": 500 for i in range(50)}
    root = Synthetic(sites=sites, rounds=200, faults=False).write(tmp_path)
    client = browser(of(RunDirectories(root)))
    started = time.process_time()
    answer = client.get(f"/runs/{root.name}", headers=HTML)
    first = time.process_time() - started
    started = time.process_time()
    client.get(f"/runs/{root.name}/live")
    again = time.process_time() - started
    print(f"first {first:.3f} s, refreshed {again:.3f} s of CPU, {len(answer.content):,} bytes")
    assert len(re.findall(r'<svg class="lane"', answer.text)) == 50
    assert first < 1.5
    assert again < 0.75


def test_templates_escape_everything_by_default():
    text = Templates().render(
        "signin.html",
        title="<b>",
        session=None,
        coordinator=False,
        message="<i>",
        passwords=True,
        certificates=False,
    )
    assert "<b>&lt;b&gt;</b>" in text
    assert "&lt;i&gt;" in text


def test_the_list_of_runs_tells_runs_of_one_plan_apart(tmp_path):
    root = Synthetic(rounds=8, faults=False).write(tmp_path)
    text = browser(of(RunDirectories(tmp_path))).get("/", headers=HTML).text
    card = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    events = RunDirectory.open(root).events.read()
    test = [e for e in events if e["event"] == "evaluated" and e["split"] == "test"]
    shown = test or [e for e in events if e["event"] == "evaluated"]
    data = shown[-1]["split"]
    assert f"macro-F1 {shown[-1]['pooled']['macro_f1']:.3f} ({data} data)" in card
    spent = max(next(e["epsilon"] for e in events[::-1] if e.get("epsilon")).values())
    assert f"ε {spent:.2f} of 8" in card
    assert "record level, fedavg" in card


def test_scores_of_validation_and_test_data_are_shown_apart(tmp_path):
    root = Synthetic(rounds=8, faults=False).write(tmp_path)
    run = RunDirectory.open(root)
    for split, value in (("validation", 0.61), ("test", 0.58)):
        run.append_event(
            "evaluated", round=8, view="simulator", split=split, pooled={"macro_f1": value}
        )
    head = (
        browser(of(RunDirectories(root))).get(f"/runs/{root.name}/live").json()["sections"]["head"]
    )
    assert re.search(r"macro-F1, validation data</span><b>0.610", head)
    assert re.search(r"macro-F1, test data</span><b>0.580", head)


@pytest.mark.parametrize(("spent", "wrong"), [(8.0, False), (8.5, True)])
def test_an_epsilon_that_is_used_up_is_no_alarm_and_one_that_is_exceeded_is(tmp_path, spent, wrong):
    root = Synthetic(stop_after=5, faults=False).write(tmp_path)
    run = RunDirectory.open(root)
    run.append_event("round_finished", round=6, epsilon={"Orthopaedics": spent})
    sites = (
        browser(of(RunDirectories(root))).get(f"/runs/{root.name}/live").json()["sections"]["sites"]
    )
    meters = re.findall(r"<meter[^>]*>", sites)
    assert meters
    assert any("optimum" in meter for meter in meters) == wrong
