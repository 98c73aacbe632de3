"""Sites of a worker meet where they train, and nowhere else; what goes wrong at one stays there."""

import csv
import threading

import numpy as np
import pytest

from silotune.errors import QuorumLost
from silotune.models.tasks import get_task
from silotune.simulation import joint_answers, run
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.joint_answers import JointAnswers
from silotune.simulation.program import SimulatedSites, payload_for
from silotune.simulation.run import Settings, simulate
from silotune.simulation.workers import Inbox
from tests.client.test_together import CLIENT_LEVEL, SGD
from tests.federation import CHOICES, write_federation

NAMES = ("ash", "birch", "cedar", "dogwood", "elm")
UNSEEDED = {**SGD, "plan.seed": None, "rounds.number": 2, "rounds.evaluate_every": 0}


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(run, "WorkerGrid", lambda *a, **k: WorkerGrid(*a, **{**k, "workers": 0}))


@pytest.fixture
def stacked(monkeypatch):
    """How many sites trained together, each time that several did."""
    sizes, own = [], joint_answers.changes

    def changes(members):
        sizes.append(len(members))
        return own(members)

    monkeypatch.setattr(joint_answers, "changes", changes)
    return sizes


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    """Five sites; of one, dogwood, every note is shorter than any of the others."""
    made = write_federation(tmp_path_factory.mktemp("joint"), bert_folder, names=NAMES)
    path = made.folder / "dogwood" / "notes.csv"
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *([note[:2], *rest] for note, *rest in rows)])
    return made


def play(federation, name, *, listener=lambda event: None, **overrides):
    return simulate(
        federation.plan_path,
        runs=federation.folder / name,
        settings=Settings(workers=1),
        listener=listener,
        overrides={**UNSEEDED, **overrides},
    )


def told(directory, kind):
    return [event for event in directory.events if event["event"] == kind]


# --- meeting ---


def test_jobs_that_wait_for_nothing_end_one_after_the_other():
    done, running, most = [], [], []

    def job(number):
        running.append(number)
        most.append(len(running))
        done.append((number, threading.current_thread().name))
        running.remove(number)

    found = [n for n, _ in JointAnswers().run([lambda n=n: job(n) for n in range(4)])]
    assert found == [n for n, _ in done] == [0, 1, 2, 3]
    assert set(most) == {1}


def test_whoever_waits_gets_its_own_change_and_its_share_of_the_time(monkeypatch):
    place, got = JointAnswers(), {}
    monkeypatch.setattr(joint_answers, "groups", lambda members: [[2, 0], [1]])
    monkeypatch.setattr(
        joint_answers, "changes", lambda members: [np.full(1, member) for member in members]
    )

    def job(number):
        got[number] = place.change(number)

    ended = [number for number, _ in place.run([lambda n=n: job(n) for n in range(3)])]
    assert ended == [2, 0, 1]
    assert [got[n][0] for n in (2, 0)] == [np.full(1, 2), np.full(1, 0)]
    assert got[1][0] is None  # one alone trains as ever
    assert got[2][1] == got[0][1] > 0.0


def test_outside_joint_answers_nobody_waits():
    assert JointAnswers().change(None) == (None, 0.0)


def test_a_worker_takes_the_instructions_that_wait_and_no_question_among_them():
    box = Inbox()
    for task in ("a", "b", "c"):
        box._put(task)
    assert [box.next(2), box.next(9), box.empty] == [["a", "b"], ["c"], True]


# --- whole runs ---


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("settings", [{}, CLIENT_LEVEL], ids=["plain", "client-level"])
def test_sites_train_together_and_each_passes_its_own_gate(federation, stacked, settings):
    directory = play(federation, f"whole-{len(settings)}", **settings)
    assert stacked == [5, 5]
    assert len(told(directory, "site_replied")) == 10
    for name in NAMES:
        assert len(list((directory.site(name) / "outbox").iterdir())) == 2
    rounds = told(directory, "round_finished")
    assert all(0 < found["train_seconds"] <= found["seconds"] for found in rounds)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("how", ["not finite", "raises"])
def test_a_site_that_fails_fails_alone(federation, stacked, monkeypatch, how):
    task = type(get_task(federation.plan))
    own = task.losses

    def losses(self, model, batch):
        short = batch["attention_mask"].sum(1) < 6
        if how == "raises" and bool(short.any()):
            raise ArithmeticError("a record of dogwood")
        return own(self, model, batch) * short.float().masked_fill(short, float("nan")).add(1.0)

    def listen(event):
        if event["event"] == "round_started":
            monkeypatch.setattr(task, "losses", losses)

    settings = {"rounds.number": 1}
    directory = play(federation, f"failing-{how[:3]}", listener=listen, **settings)
    assert stacked == [5]
    (failed,) = told(directory, "site_failed")
    assert failed["site"] == "dogwood"
    assert failed["code"] == ("ST-000" if how == "raises" else "ST-404")
    assert {event["site"] for event in told(directory, "site_replied")} == {*NAMES} - {"dogwood"}


@pytest.mark.usefixtures("in_this_process")
def test_a_site_whose_books_refuse_does_not_keep_the_others(federation, stacked, monkeypatch):
    """What comes before the training, comes before it here too."""
    own = SimulatedSites.site

    def site(self, index):
        found = own(self, index)
        if found.site.name == "elm":
            found._require_usable = refuse
        return found

    def refuse(adapter):
        raise QuorumLost("no")

    monkeypatch.setattr(SimulatedSites, "site", site)
    directory = play(federation, "refusing", **{"rounds.number": 1})
    assert stacked == [4]
    assert [event["site"] for event in told(directory, "site_failed")] == ["elm"]
    assert len(told(directory, "site_replied")) == 4


def test_sites_of_a_seeded_run_each_train_alone(federation, tmp_path):
    plan = federation.plan.override(SGD)
    sites = federation.sites
    payload = payload_for(
        plan,
        run="r",
        sites=sites,
        states=[tmp_path / site.name for site in sites],
        choices=CHOICES,
        shared=tmp_path / "shared",
    )
    assert SimulatedSites(payload).joint is None


@pytest.mark.slow
def test_a_worker_process_takes_what_waits_for_it(federation):
    """A real worker: its sites' replies are those of sites alone, so the run goes as well."""
    directory = play(federation, "process")
    assert len(told(directory, "site_replied")) == 10
