"""The whole product: enrolled, approved and run by the real commands, equal to the simulation."""

import pytest

from tests.e2e.harness import cli


@pytest.mark.slow
def test_a_deployed_run_gives_the_simulations_adapter_bit_for_bit(federation, tmp_path):
    made = federation(rounds__number=3).up()
    run = made.propose()
    made.coordinator.wait_finished(run)
    assert made.as_simulated(run, tmp_path / "adapter")
    assert made.charges(run) == {name: [1, 2, 3] for name in made.sites}
    coordinator = made.coordinator.folder / "state"
    for site in made.sites.values():
        cli("audit", "verify", coordinator, "--against", site.folder / "state")
        cli("audit", "verify", site.folder / "state", "--against", coordinator)


@pytest.mark.slow
def test_a_coordinator_killed_in_a_round_goes_on_by_itself_and_nothing_is_done_twice(
    federation, tmp_path
):
    made = federation(rounds__number=6).up()
    run = made.propose()
    made.coordinator.wait_round(run, 3)
    made.coordinator.kill()
    made.coordinator.up()
    made.coordinator.wait_finished(run)
    assert made.coordinator.events(run, "run_resumed")
    assert made.as_simulated(run, tmp_path / "adapter")
    assert made.charges(run) == {name: [1, 2, 3, 4, 5, 6] for name in made.sites}


@pytest.mark.slow
def test_only_the_sites_that_are_drawn_for_a_round_are_asked_and_pay_for_it(federation, tmp_path):
    made = federation(rounds__number=4, rounds__sites=2, rounds__min_sites=2).up()
    run = made.propose()
    made.coordinator.wait_finished(run)
    cohorts = {e["round"]: e["cohort"] for e in made.coordinator.events(run, "round_started")}
    assert [len(cohorts[number]) for number in (1, 2, 3, 4)] == [2, 2, 2, 2]
    asked = {name: [n for n in sorted(cohorts) if name in cohorts[n]] for name in made.sites}
    assert made.charges(run) == asked
    assert any(len(rounds) < 4 for rounds in asked.values())
    assert made.as_simulated(run, tmp_path / "adapter")
