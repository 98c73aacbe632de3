"""A trainer that lies, hangs or dies: the site lives, says which code, and sends nothing but noise."""

import socket
import time
from pathlib import Path

import numpy as np
import pytest

from silotune.client.site_run import SiteRun
from silotune.client.terms import metric_sigma
from silotune.client.training.bounds import table_of
from silotune.client.training.launcher import Launcher
from silotune.client.training.process import TrainerProcesses
from silotune.client.troubles import latest_troubles
from tests.client.hostile_trainer import SIZE, WAYS
from tests.federation import PRIVATE, write_federation

FAULTS = {
    "killed": "ST-751",
    "segfault": "ST-751",
    "quits": "ST-751",
    "stuck": "ST-752",
    "memory": "ST-753",
    "disk": "ST-754",
    "other": "ST-755",
    "garbage": "ST-755",
    "endless": "ST-755",
    "oversized": "ST-755",
    "short": "ST-404",
    "nan": "ST-404",
    "float32": "ST-404",
    "bytes": "ST-404",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    settings = {key.replace(".", "__"): value for key, value in PRIVATE.items()}
    settings |= {
        "rounds__number": 4, "rounds__deadline": 1.0, "privacy__rate": 0.5,
        "optimizer__site__head_rounds": 4, "privacy__metrics_share": 0.2, "rounds__evaluate_every": 1,
    }  # fmt: skip
    made = write_federation(folder / "sites", folder / "no-model", names=("alpha",), **settings)
    table = table_of(made.sites[0], scratch=folder / "scratch", models=[str(folder / "no-model")])
    launcher = Launcher(table, program="tests.client.hostile_trainer")
    yield folder, made, launcher
    launcher.close()
    assert not list((folder / "scratch").iterdir())  # nothing of any process is left


class Site:
    """A site whose trainer does what it is told to do."""

    def __init__(self, place, name):
        folder, made, launcher = place
        self.state = folder / name
        self.processes = TrainerProcesses(made.sites[0], launcher=launcher)
        self.part = SiteRun(
            made.sites[0], state=self.state, plan=made.plan, run="r", models=self.processes
        )

    def asked(self, way, number=1):
        adapter = np.zeros(SIZE, np.float32)
        adapter[0] = WAYS.index(way)
        return self.part.train(adapter, number).array_records["update"]["flat"].numpy()

    def counted(self, way, number=1):
        adapter = np.zeros(SIZE, np.float32)
        adapter[0] = WAYS.index(way)
        return self.part.evaluate(adapter, number).array_records["counts"]["flat"].numpy()

    def codes(self):
        return [trouble["error"] for trouble in latest_troubles(self.state)]


@pytest.fixture
def site(place, request):
    made = Site(place, request.node.name)
    made.part.join()
    yield made
    made.processes.close()


@pytest.fixture(scope="module")
def honest(place):
    """The update of an honest trainer, which sums up to ones; its noise is the plan's seed's."""
    made = Site(place, "honest")
    made.part.join()
    yield made.asked("honest")
    made.processes.close()


@pytest.mark.parametrize("way", FAULTS)
def test_whatever_the_trainer_does_noise_alone_leaves_and_the_site_knows_why(site, honest, way):
    """The noise of a seeded round is known: what is left without it is what the trainer told."""
    started = time.monotonic()
    sent = site.asked(way)
    assert time.monotonic() - started < 20
    assert site.codes() == [FAULTS[way]]
    np.testing.assert_allclose(honest - sent, np.ones(SIZE), atol=1e-4)
    assert len(site.part.ledger.events("notes")) == 1


def test_a_sum_that_is_far_too_long_is_shortened_before_the_noise(site):
    """Projected onto a ball: a unit more or less still moves it by a clip at most."""
    clip = PRIVATE["privacy.clip"]["head"]
    batch = site.part.plan.expected_batch(site.part.dataset.declared_units)
    longest, noise = (4 * batch + 16) * clip, site.part.sigma * clip
    assert abs(np.linalg.norm(site.asked("long")) - longest) < 8 * noise


def test_counts_below_zero_count_as_none(site):
    spread = metric_sigma(site.part.plan)
    assert np.abs(site.counted("long")).max() < 8 * spread
    assert np.abs(site.counted("honest", 2) - 1).max() < 8 * spread


def test_after_a_fault_the_next_round_has_a_process_of_its_own(site):
    first = site.processes.describe()["pid"]
    site.asked("killed")
    assert site.processes.describe() is None
    assert not Path(f"/proc/{first}").exists()
    site.asked("honest", 2)
    assert site.processes.describe()["pid"] != first
    assert site.codes() == ["ST-751"]


def test_a_trainer_is_kept_between_rounds_and_ended_when_nothing_is_asked_of_it(site):
    resources = site.part.site.resources.model_copy(update={"keep_warm": 0.5})
    site.processes.site = site.part.site.model_copy(update={"resources": resources})
    pid = site.processes.describe()["pid"]
    site.asked("honest")
    assert site.processes.describe()["pid"] == pid
    ends = time.monotonic() + 10
    while site.processes.describe() is not None:
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    site.asked("honest", 2)
    assert site.processes.describe()["pid"] != pid
    assert site.codes() == []


def test_a_launcher_starts_what_is_in_its_table_and_nothing_else(place):
    """Whoever has taken the daemon over can ask it for no other file, program or address."""
    launcher = place[2]
    ours, theirs = socket.socketpair()
    settings = {"work": "train", "style": "text", "level": "info"}
    with ours, theirs:
        for wanted in ({"model": "/etc", "dataset": ""}, {"model": "", "dataset": "../notes"}):
            with pytest.raises(OSError, match="KeyError"):
                launcher.start(theirs, **settings, **wanted)
        with pytest.raises(OSError, match="no such question"):
            launcher._ask({"ask": "exec", "program": "sh"})
        with pytest.raises(OSError, match="KeyError"):
            launcher._ask({"ask": "ended", "pid": 1, "seconds": 0})
