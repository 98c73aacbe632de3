"""Secure aggregation between real processes over TLS, equal to the simulation."""

import pytest

from tests.e2e.harness import same


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
    row = made.coordinator.wait_over(run)
    assert row["state"] == "finished", row
    assert not made.coordinator.events(run, "round_void")
    assert not made.coordinator.events(run, "site_failed")
    finished = made.coordinator.events(run, "round_finished")
    assert [event["exchanges"] for event in finished] == [4, 2, 2]
    deployed = made.coordinator.adapter(run, tmp_path / "adapter")
    for site in made.sites.values():
        site.terminate()
    # The masks differ from run to run and cancel to the last bit.
    assert same(deployed, made.simulated())
    assert made.charges(run) == {name: [1, 2, 3] for name in made.sites}
