"""A coordinator's process that is killed in secure rounds, again and again: the simulation's adapter."""

import json

import pytest

ROUNDS = 10
# One a round but the first, where keys and shares have exchanges of their own.
DEATHS = [
    [1, "keys", "before"], [1, "keys", 2], [1, "share", "before"], [1, "share", 3],
    [1, "settle", "before"], [1, "settle", "after"], [1, "masked", 1],
    [2, "masked", "before"], [2, "masked", 2], [2, "masked", 3],
    [3, "open", "before"], [3, "open", 1],
    [4, "open", 2], [4, "open", 3],
    [5, "checkpoint", "before"],
    [6, "checkpoint", "after"],
    [7, "settle", "after"], [7, "masked", 3], [7, "open", "before"], [7, "checkpoint", "before"],
    [8, "masked", 1], [8, "open", 2],
    [10, "masked", 2], [10, "open", 3], [10, "checkpoint", "before"], [10, "checkpoint", "after"],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_killed_round_is_finished_and_the_adapter_is_the_simulations(federation, tmp_path):
    made = federation(
        rounds__number=ROUNDS,
        rounds__evaluate_every=0,
        aggregation__secure=True,
        aggregation__cohort=3,
        aggregation__threshold=3,
        privacy__noise="shared",
    )
    mark, coordinator = tmp_path / "deaths", made.coordinator
    coordinator.dies(DEATHS, mark)
    made.up()
    run = made.propose()
    deaths = coordinator.wait_finished_over_deaths(run, seconds=1200.0)
    died = [json.loads(line) for line in mark.read_text().splitlines()]
    assert len(died) == len(DEATHS) == deaths
    print(f"{deaths} deaths")
    assert not coordinator.events(run, "round_void")
    assert not coordinator.events(run, "site_failed")
    assert made.as_simulated(run, tmp_path / "adapter")
    assert made.charges(run) == {name: list(range(1, ROUNDS + 1)) for name in made.sites}
