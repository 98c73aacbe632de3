"""Many sites, few of them a round: nothing of a site is worked on in a round that does not ask it."""

import os
import tracemalloc
from pathlib import Path

import pytest

from silotune.data.declared import new_secret
from silotune.privacy.ledger import Ledger
from silotune.rounds.rounds import RoundLoop
from silotune.rounds.run_directory import RunDirectory
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.outcome import LoggedStore
from silotune.simulation.pool import SiteSlot
from silotune.simulation.program import payload_for
from silotune.simulation.run import keep_survey, survey_sites
from tests.federation import CHOICES, PRIVATE, write_federation

NAMES = tuple(f"s{number:02d}" for number in range(12))
ROUNDS, ASKED = 30, 2


class Looked:
    """What there is after each round: bytes that Python holds, and when each site's state changed."""

    def __init__(self, directory):
        self.directory, self.held, self.touched = directory, [], []

    def after_round(self, server_round, adapter, *, seconds):
        self.held.append(tracemalloc.get_traced_memory()[0])
        self.touched.append(
            {
                site: max(path.stat().st_mtime_ns for path in folder.rglob("*"))
                for site in NAMES
                for folder in [self.directory.site(site)]
            }
        )


@pytest.fixture(scope="module")
def played(tmp_path_factory, bert_folder):
    """A private run in this process, and every path that was forced to the disk."""
    folder = tmp_path_factory.mktemp("many")
    made = write_federation(folder / "sites", bert_folder, names=NAMES)
    settings = {"rounds.number": ROUNDS, "rounds.sites": ASKED, "rounds.evaluate_every": 0}
    plan = made.plan.override({**PRIVATE, **settings})
    forced, sync = [], os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os,
            "fsync",
            lambda file: (forced.append(str(Path(f"/proc/self/fd/{file}").readlink())), sync(file)),
        )
        directory = RunDirectory.create(folder, "many", plan_toml="")
        directory.write_json("resolved.json", {})
        secrets = {name: new_secret() for name in NAMES}
        found = survey_sites(plan, made.sites, secrets=secrets, note=lambda sentence: None)
        keep_survey(directory, found, secrets)
        states = [directory.site(name) for name in NAMES]
        payload = payload_for(
            plan, run="run", sites=made.sites, states=states, choices=CHOICES, shared=folder / "x"
        )
        looked = Looked(directory)
        store = LoggedStore(directory, plan=plan, names=NAMES, listener=lambda event: None)
        slots = [SiteSlot(name) for name in NAMES]
        tracemalloc.start()
        try:
            with WorkerGrid("silotune.simulation.program:build", payload, slots, workers=0) as grid:
                grid.wait_until_ready()
                RoundLoop(plan=plan, run="run", grid=grid, store=store, observer=looked).execute()
        finally:
            tracemalloc.stop()
    return directory, looked, forced


def test_a_round_touches_the_state_of_the_sites_it_asks_and_no_other(played):
    directory, looked, _ = played
    cohorts = [set(e["cohort"]) for e in directory.events if e["event"] == "round_started"]
    assert len(cohorts) == ROUNDS
    for number in range(1, ROUNDS):
        before, after = looked.touched[number - 1], looked.touched[number]
        assert {site for site in NAMES if after[site] != before[site]} == cohorts[number]
    for site in NAMES:
        ledger = Ledger(directory.site(site) / "ledger.sqlite", create=False)
        assert len(ledger.events("notes")) == sum(site in cohort for cohort in cohorts)
        ledger.close()


def test_simulated_sites_force_nothing_to_the_disk(played):
    directory, _, forced = played
    sites = str(Path(directory.root / "sites").resolve())
    assert forced  # the run's own checkpoints are
    assert not [path for path in forced if path.startswith(sites)]


def test_memory_does_not_grow_with_the_rounds(played):
    """Beyond the history of a round, which pages and reports show: some hundred bytes a site asked."""
    _, looked, _ = played
    first, last = looked.held[ROUNDS // 2], looked.held[-1]
    assert (last - first) / (ROUNDS - 1 - ROUNDS // 2) < 16_000


def test_a_site_that_was_not_asked_is_not_late_and_its_epsilon_is_told_when_it_is(played):
    directory, _, _ = played
    cohorts = {
        e["round"]: set(e["cohort"]) for e in directory.events if e["event"] == "round_started"
    }
    for event in directory.events:
        if event["event"] == "round_finished":
            assert set(event["epsilon"]) == cohorts[event["round"]]
        assert event["event"] not in {"site_failed", "site_silent"}
