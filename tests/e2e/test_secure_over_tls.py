"""Secure aggregation between real processes over TLS, equal to the simulation."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from silotune.client.model_cache import ModelCache
from silotune.data.site import load_sites
from silotune.models.layout import initial_adapter
from tests.e2e.harness import wait_for
from tests.federation import CHOICES
from tests.simulation.plain_rounds import PHASES, plainly, random_faults, replied


@pytest.mark.slow
def test_a_deployed_secure_run_with_shared_noise_gives_the_simulations_adapter(
    federation, tmp_path
):
    made = federation(
        rounds__number=3,
        aggregation__secure=True,
        aggregation__cohort=3,
        aggregation__threshold=3,
        privacy__noise="shared",
    ).up()
    run = made.propose()
    made.coordinator.wait_finished(run)
    assert not made.coordinator.events(run, "round_void")
    assert not made.coordinator.events(run, "site_failed")
    finished = made.coordinator.events(run, "round_finished")
    assert [event["exchanges"] for event in finished] == [4, 2, 2]
    # The masks differ from run to run and cancel to the last bit.
    assert made.as_simulated(run, tmp_path / "adapter")
    assert made.charges(run) == {name: [1, 2, 3] for name in made.sites}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_correlated_shares_outlive_coordinator_and_sites_and_give_the_simulations_adapter(
    federation, tmp_path
):
    """Each dies within a block; a site's rows of noise are found again, or its sums would be others."""
    made = federation(
        rounds__number=6,
        rounds__evaluate_every=0,
        aggregation__secure=True,
        aggregation__cohort=3,
        aggregation__threshold=3,
        privacy__noise="shared",
        privacy__bands=3,
        privacy__band_weights=[1.0, 0.7, 0.4],
        optimizer__server={"name": "sgd", "momentum": 0.5},
        optimizer__site__head_rounds=0,
    )
    deaths = [[2, "masked", 2], [3, "open", 1], [5, "checkpoint", "before"]]
    made.coordinator.dies(deaths, tmp_path / "deaths")
    made.up()
    run, names = made.propose(), list(made.sites)

    def another_dies_too():
        site = made.sites[names.pop(0)]
        site.kill()
        site.start()

    made.coordinator.wait_finished_over_deaths(run, seconds=500.0, after_death=another_dies_too)
    assert not names  # all three were killed
    assert not made.coordinator.events(run, "round_void")
    assert made.as_simulated(run, tmp_path / "adapter")
    # Both blocks, and each round that rests on them, once.
    assert made.charges(run) == {name: [1, 1, 2, 3, 4, 4, 5, 6] for name in made.sites}


FIVE = ("alpha", "beta", "delta", "epsilon", "gamma")


class Unsteady:
    """Starts sites that drop out as they are told, and starts those that died again once given up."""

    def __init__(self, made, faults):
        self._made, self._seen = made, 0
        self._faults = {name: [] for name in made.sites}
        for turn, fault in enumerate(faults):
            name, number, phase = fault.split()
            # A third of them die; it takes the coordinator some 25 s to give a silent site up.
            how = "dies" if turn % 3 == 1 else "refuses"
            self._faults[name].append([int(number), phase, how])
        self.deaths = 0

    def start(self, name):
        site = self._made.sites[name]
        script = Path(__file__).with_name("failing_site.py")
        words = ["site", "start", "--config", site.config, "--log-level", "debug"]
        faults = json.dumps(self._faults[name])
        site.start(command=[sys.executable, str(script), faults, *map(str, words)])

    def revive(self, run):
        """Whoever died and was given up since: without the faults of the rounds so far."""
        events = self._made.coordinator.events(run, "site_failed")
        for event in events[self._seen :]:
            name = event["site"]
            if not self._made.sites[name].running:
                left = [f for f in self._faults[name] if f[0] > event["round"]]
                self._faults[name] = left
                self.deaths += 1
                self.start(name)
        self._seen = len(events)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_rounds_of_five_sites_that_drop_out_and_die_equal_the_plain_run(federation, tmp_path):
    """Every phase loses sites, by a refusal or by SIGKILL; void rounds apart, no update is lost."""
    made = federation(
        names=FIVE,
        patience=1.0,
        rounds__number=10,
        rounds__evaluate_every=0,
        aggregation__secure=True,
        aggregation__cohort=5,
        aggregation__threshold=3,
    )
    faults = random_faults(FIVE, 10, seed=3)
    assert {fault.split()[2] for fault in faults} == set(PHASES)
    unsteady = Unsteady(made, faults)
    made.coordinator.up()
    made.enrol()
    for name in FIVE:
        unsteady.start(name)
    made.wait_online()
    run = made.propose()

    def over():
        unsteady.revive(run)
        return made.coordinator.over(run)

    row = wait_for(over, seconds=800.0, what="the end of the run", every=0.3)
    assert row["state"] == "finished", row
    assert unsteady.deaths >= 3
    present = replied(made.coordinator.events(run))
    assert len(present) == 10
    assert sum(len(sites) < 5 for sites in present.values()) >= 3
    deployed = made.coordinator.adapter(run, tmp_path / "adapter")
    for name, charged in made.charges(run).items():
        assert len(charged) == len(set(charged))
        assert {number for number, sites in present.items() if name in sites} <= set(charged)
    for site in made.sites.values():
        site.terminate()
    sites = load_sites(made.folder / "sites")
    plain = plainly(sites, made.plan, present, tmp_path / "plain")
    layout = ModelCache(CHOICES).for_plan(made.plan, base=str(made.plan.model.base)).model.layout
    names = sorted(deployed)
    start, plain = layout.unpack(initial_adapter(layout, made.plan)), layout.unpack(plain)
    moved = max(np.abs(plain[name] - start[name]).max() for name in names)
    assert all(np.abs(deployed[name] - plain[name]).max() < 2e-4 * moved for name in names)
