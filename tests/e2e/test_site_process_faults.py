"""A site's daemon as a real process: killed, stopped, starved of disk; against a test's coordinator."""

import hashlib
import json
import resource
import time

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from silotune.models.base import outline
from silotune.privacy.ledger import Ledger
from silotune.protocol import http
from silotune.protocol.envelope import ENVELOPE, refusal_code, seal_id, unseal
from silotune.trust.audit import AuditLog
from silotune.trust.identity import decode_signing_key
from tests.client.coordinator_double import CoordinatorDouble
from tests.client.site_material import write_site_folder
from tests.client.site_process import SiteProcess
from tests.promises.test_promise_3_the_sites_word_is_final import PLANS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SECONDS = 180.0


class Scene:
    """One site and its coordinator, and the protocol between them in shorthand."""

    def __init__(self, double, process, plan, base):
        self.double, self.process, self.plan, self.base = double, process, plan, base

    def approve(self, run, plan=None):
        self.double.propose(run, plan or self.plan)
        self.process.wait_until(lambda s: s["proposed"] >= 1, seconds=SECONDS)
        self.process.site("approve", run)

    def request(self, kind, number=0, *, run, plan=None):
        plan = plan or self.plan
        records = {}
        if number:
            flat = np.zeros(outline(plan, base=str(self.base)).size, dtype=np.float32)
            records = {"arrays": ArrayRecord({"flat": Array(flat)})}
        content = self.double.content(run, plan, server_round=number, **records)
        address = self.double.address(run, kind, number)
        return address, self.double.sealed(content, address=address)

    def send(self, kind, number=0, *, run, plan=None):
        address, sealed = self.request(kind, number, run=run, plan=plan)
        self.double.send(self.double.message(sealed, kind))
        return address, sealed

    def ask(self, kind, number=0, *, run, plan=None):
        before = len(self.double.replies)
        address, sealed = self.send(kind, number, run=run, plan=plan)
        reply = self.double.wait_for_replies(before + 1, seconds=SECONDS)[-1]
        key = decode_signing_key(self.double.member.signing_key)
        return unseal(reply.content, address=address.reply(to=seal_id(sealed)), key=key)

    def charges(self, run):
        path = self.process.folder / "state" / "ledger.sqlite"
        if not path.exists():
            return []
        ledger = Ledger(path, create=False)
        rows = [r for r in ledger.rows() if r.entry.kind == "charge" and r.entry.run == run]
        ledger.verify()
        ledger.close()
        return rows

    def audit(self):
        log = AuditLog(self.process.folder / "state" / "audit.jsonl")
        log.verify()
        return [{"kind": line.kind, **line.fields} for line in log.lines()]

    def wait_for(self, wanted, what):
        ends = time.monotonic() + SECONDS
        while not wanted():
            assert time.monotonic() < ends, f"{what}\n{self.process.output()}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def scene(tmp_path_factory, bert_folder):
    folder = tmp_path_factory.mktemp("faults")
    # Many steps a round, so that there is time to interfere; no budget clause binds here.
    settings = {
        "rounds__local_steps": 60, "optimizer__site__head_rounds": 0, "privacy__epsilon": 1.0,
        "rounds__number": 5,
    }  # fmt: skip
    made = write_site_folder(folder / "sites", bert_folder, **settings)
    with CoordinatorDouble(folder / "coordinator") as double:
        process = SiteProcess(made.folder)
        process.join(double.invitation())
        yield Scene(double, process, made.plan, bert_folder)
        process.stop()


@pytest.fixture
def running(scene):
    scene.double.hook = None
    scene.process.start().wait_until(lambda s: s["link"] == "online", seconds=SECONDS)
    yield scene
    scene.double.hook = None
    scene.process.stop()


def test_files_of_a_run_go_thirty_days_after_its_end_and_those_of_an_open_one_stay(running):
    """The daemon is off for a month, by the time that it wrote down."""
    state = running.process.folder / "state"

    def files(run):
        stem = hashlib.sha256(run.encode()).hexdigest()[:16]
        return list((state / "outbox").glob(f"{stem}-*"))

    for run in ("gone", "open"):
        running.approve(run)
        running.ask("query.join", run=run)
        running.ask("train", 1, run=run)
    running.double.propose("gone", running.plan, state="finished")
    path = state / "plans" / "gone.json"
    running.wait_for(lambda: json.loads(path.read_text())["settled"], "not settled")
    running.process.kill()
    content = json.loads(path.read_text())
    content["settled_at"] -= 31 * 24 * 3600
    path.write_text(json.dumps(content))
    assert files("gone") and files("open")
    running.process.start().wait_until(lambda s: s["link"] == "online", seconds=SECONDS)
    running.wait_for(lambda: not files("gone"), "still there")
    running.wait_for(lambda: any(e["kind"] == "files_removed" for e in running.audit()), "no line")
    assert files("open")


LIBRARIES = ("torch", "scipy", "pyarrow", "tokenizers", "pandas")


def libraries_of(pid):
    """Which libraries of training and reading a process has in its memory."""
    paths = {m.path for m in psutil.Process(pid).memory_maps()}
    return {name for name in LIBRARIES if any(f"/{name}/" in path for path in paths)}


def test_an_idle_site_is_small_and_is_again_after_a_run_and_listens_to_nobody(running):
    """Before, the libraries of training were in the daemon: 293 MB, and 1,000 and more after a run."""
    pid = running.process.process.pid
    time.sleep(2)
    idle = running.process.rss_mb()
    running.approve("small")
    assert refusal_code(running.ask("query.join", run="small")) is None
    trainer = running.process.status()["trainer"]
    assert "torch" in libraries_of(trainer["pid"])
    for number in (1, 2):
        assert refusal_code(running.ask("train", number, run="small")) is None
        assert running.process.status()["trainer"]["pid"] == trainer["pid"]
        assert libraries_of(pid) == set()
    running.double.propose("small", running.plan, state="finished")
    running.wait_for(lambda: not psutil.pid_exists(trainer["pid"]), "the trainer is there still")
    time.sleep(10)
    after = running.process.rss_mb()
    print(f"a site's daemon: {idle:.0f} MB idle, {after:.0f} MB ten seconds after a run")
    assert idle < 90 and after < idle + 15
    assert libraries_of(pid) == set()
    mine = psutil.Process(pid)
    kinds = {c.status for c in mine.net_connections(kind="inet")}
    assert psutil.CONN_LISTEN not in kinds
    assert psutil.CONN_ESTABLISHED in kinds


def test_the_cli_shows_a_plan_pauses_resumes_and_stops(running):
    running.double.propose("shown", running.plan)
    running.process.wait_until(lambda s: s["proposed"] == 1, seconds=SECONDS)
    shown = running.process.site("plans").stdout
    for part in ("Purpose", "What leaves", "Epsilon", "max_total_epsilon", "pass", "approve"):
        assert part in shown
    print(shown)
    running.process.site("reject", "shown", "--reason", "not now")
    assert [(d.verdict, d.reason) for d in running.double.decisions][-1] == ("rejected", "not now")
    assert refusal_code(running.ask("query.join", run="shown")) == "ST-517"
    running.process.site("pause")
    assert running.process.status()["paused"] is True
    running.process.site("resume")
    assert running.process.terminate(SECONDS) == 0
    assert running.audit()[-1] == {"kind": "stopped", "abandoned": ""}


def test_killed_while_idle_it_is_back_at_once(running):
    before = len(running.double.activations)
    running.process.kill()
    started = time.monotonic()
    running.process.start()
    running.wait_for(lambda: len(running.double.activations) > before, "not activated")
    wall = time.monotonic() - started
    times = psutil.Process(running.process.process.pid).cpu_times()
    print(f"back after {wall:.1f} s, {times.user + times.system:.1f} s of processor time")
    # Processor time: a shared machine may give the process a tenth of a core.
    assert times.user + times.system < 5.0


def test_a_trainer_that_is_killed_costs_a_round_and_the_next_has_another(running):
    """The coordinator gets an update of the plan's form, and is told nothing of it."""
    running.approve("trainer")
    assert refusal_code(running.ask("query.join", run="trainer")) is None
    trainer = running.process.status()["trainer"]
    running.send("train", 1, run="trainer")
    running.wait_for(lambda: running.charges("trainer"), "no charge")
    replies = len(running.double.replies)
    psutil.Process(trainer["pid"]).kill()
    running.double.wait_for_replies(replies + 1, seconds=SECONDS)
    assert refusal_code(running.ask("train", 1, run="trainer")) is None
    told = running.process.status()["failures"][-1]
    assert "ST-751" in told and "round 1 of trainer" in told
    assert refusal_code(running.ask("train", 2, run="trainer")) is None
    assert running.process.status()["trainer"]["pid"] != trainer["pid"]
    assert len(running.charges("trainer")) == 2


def test_a_daemon_whose_launcher_is_killed_ends_to_be_started_again(running):
    me = psutil.Process(running.process.process.pid)
    (launcher,) = [c for c in me.children() if "launcher" in " ".join(c.cmdline())]
    launcher.kill()
    assert running.process.process.wait(60) == 70
    assert "ST-756" in running.process.output()


def test_killed_while_training_the_round_is_done_again_under_the_charge_it_began_with(running):
    running.approve("trained")
    assert refusal_code(running.ask("query.join", run="trained")) is None
    running.send("train", 1, run="trained")
    running.wait_for(lambda: running.charges("trained"), "no charge")
    replies = len(running.double.replies)
    running.process.kill()
    assert len(running.double.replies) == replies
    charged = running.charges("trained")
    assert len(charged) == 1
    running.process.start().wait_until(lambda s: s["link"] == "online", seconds=SECONDS)
    assert refusal_code(running.ask("train", 1, run="trained")) is None
    assert running.charges("trained") == charged


def test_killed_in_training_a_second_time_the_run_stops_at_the_site(running):
    running.approve("twice")
    assert refusal_code(running.ask("query.join", run="twice")) is None
    for number in (1, 2):
        running.send("train", number, run="twice")
        running.wait_for(lambda n=number: len(running.charges("twice")) == n, "no charge")
        running.process.kill()
        running.process.start().wait_until(lambda s: s["link"] == "online", seconds=SECONDS)
        code = refusal_code(running.ask("train", number, run="twice"))
        assert code == (None if number == 1 else "ST-411")
    assert refusal_code(running.ask("train", 3, run="twice")) == "ST-411"
    assert len(running.charges("twice")) == 2
    troubles = (running.process.folder / "state" / "troubles.jsonl").read_text()
    died = [line for line in troubles.splitlines() if '"died"' in line and '"twice"' in line]
    assert len(died) == 2


def test_killed_while_releasing_the_answer_is_the_same_and_charged_once(running):
    running.approve("released")
    assert refusal_code(running.ask("query.join", run="released")) is None
    reached = []

    def hold(path, body):
        if path == http.PUSH:
            reached.append(path)
            time.sleep(5)
            return 500, b"", {}
        return None

    running.double.hook = hold
    running.send("train", 1, run="released")
    running.wait_for(lambda: reached, "no release")
    running.process.kill()
    charged = running.charges("released")
    assert len(charged) == 1
    running.double.hook = None
    running.process.start().wait_until(lambda s: s["link"] == "online", seconds=SECONDS)
    first = running.ask("train", 1, run="released")
    second = running.ask("train", 1, run="released")
    assert first["update"]["flat"].data == second["update"]["flat"].data
    assert running.charges("released") == charged


def test_sigterm_lets_a_step_finish_or_abandons_it_whole(running):
    running.approve("stopped")
    assert refusal_code(running.ask("query.join", run="stopped")) is None
    replies = len(running.double.replies)
    running.send("train", 1, run="stopped")
    running.process.wait_until(lambda s: s["work"] == "train", seconds=SECONDS)
    running.process.process.terminate()
    assert running.process.process.wait(SECONDS) == 0
    done = len(running.double.replies) - replies
    assert done <= len(running.charges("stopped")) <= 1  # charged when it began
    assert running.audit()[-1]["abandoned"] == ("" if done else "train")
    replies = len(running.double.replies)
    running.process.start("--grace", "0").wait_until(
        lambda s: s["link"] == "online", seconds=SECONDS
    )
    running.send("train", 2, run="stopped")
    running.process.wait_until(lambda s: s["work"] == "train", seconds=SECONDS)
    running.process.process.terminate()
    assert running.process.process.wait(SECONDS) == 0
    assert running.audit()[-1] == {"kind": "stopped", "abandoned": "train"}
    assert len(running.double.replies) == replies
    # Charged or not when it ended: asked again, it is answered, and charged once.
    running.process.start().wait_until(lambda s: s["link"] == "online", seconds=SECONDS)
    assert refusal_code(running.ask("train", 2, run="stopped")) is None
    assert [row.entry.round for row in running.charges("stopped")].count(2) == 1


def test_two_daemons_on_one_state_are_one_too_many(running):
    found = running.process.site("start", check=False)
    assert found.returncode == 60
    assert "ST-644" in found.stderr


def test_a_full_disk_stops_the_release_and_nothing_is_lost(running):
    running.approve("full")
    assert refusal_code(running.ask("query.join", run="full")) is None
    pid = running.process.process.pid
    free = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    # No file of the running daemon may grow beyond this: less than its ledger has.
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (8192, free[1]))
    assert refusal_code(running.ask("train", 1, run="full")) == "ST-400"
    assert running.charges("full") == []
    resource.prlimit(pid, resource.RLIMIT_FSIZE, free)
    assert refusal_code(running.ask("train", 1, run="full")) is None
    assert len(running.charges("full")) == 1
    running.audit()


@pytest.mark.parametrize("clause", PLANS)
def test_a_plan_that_breaks_a_clause_can_be_neither_approved_nor_run(running, clause):
    settings, code = PLANS[clause]
    if clause == "max_total_epsilon":
        first = running.plan.override({"privacy.epsilon": 4.0})
        running.approve("spends", first)
        assert refusal_code(running.ask("query.join", run="spends", plan=first)) is None
    run, plan = f"breaks-{clause}".replace("_", "-"), running.plan.override(settings)
    running.double.propose(run, plan)
    running.wait_for(lambda: run in running.process.site("plans", "--json").stdout, "no proposal")
    found = running.process.site("approve", run, check=False)
    assert found.returncode != 0
    assert code in found.stderr
    for kind, number in (("query.join", 0), ("train", 1)):
        assert refusal_code(running.ask(kind, number, run=run, plan=plan)) == "ST-516"
    assert running.charges(run) == []


def test_a_replayed_message_changes_nothing_and_a_tampered_one_is_refused(running):
    running.approve("replayed")
    assert refusal_code(running.ask("query.join", run="replayed")) is None
    _, sealed = running.request("train", 1, run="replayed")
    answers = [running.double.exchange(sealed, "train", seconds=SECONDS) for _ in range(3)]
    contents = [seal_id(answer.content) for answer in answers]
    assert contents[0] == contents[1] == contents[2]
    charged = running.charges("replayed")
    assert len(charged) == 1
    _, later = running.request("train", 2, run="replayed")
    mixed = {**sealed, ENVELOPE: later[ENVELOPE]}  # round 1 under round 2's envelope
    flipped = []
    for name in later.keys() - {ENVELOPE}:
        packed = later[name]["bytes"]
        changed = ConfigRecord({"bytes": packed[:-1] + bytes([packed[-1] ^ 1])})
        flipped.append({**later, name: changed})
    for content in (mixed, *flipped):
        answer = running.double.exchange(RecordDict(content), "train", seconds=SECONDS)
        assert answer.error.reason == "ST-804"
    assert running.charges("replayed") == charged
    refused = [line for line in running.audit() if line["kind"] == "refused"]
    assert len(flipped) > 1
    assert [line["code"] for line in refused[-3:]] == ["ST-804"] * 3


def test_leaving_revokes_and_keeps_the_books(running):
    running.process.site("leave", "--yes")
    assert running.process.process.wait(SECONDS) == 0
    assert [goodbye.name for goodbye in running.double.left] == ["alpha"]
    state = running.process.folder / "state"
    assert not list((state / "outbox").iterdir())
    assert "left" in [line["kind"] for line in running.audit()]
    assert not list(state.glob("*.key.sealed"))
    assert running.process.site("start", check=False).returncode == 60
