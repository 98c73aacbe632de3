"""Noise that is correlated over rounds, at real sites: as simulated, also if a site dies."""

from collections import Counter

import pytest

ROUNDS = 8
BANDED = {
    "rounds__number": ROUNDS,
    "optimizer__site__head_rounds": ROUNDS,
    "optimizer__server": {"name": "sgd", "momentum": 0.5},
    "privacy__bands": 3,
    "privacy__band_weights": [1.0, 0.8, 0.6],
}


@pytest.mark.slow
def test_a_site_killed_in_a_block_goes_on_to_the_simulations_adapter_bit_for_bit(
    federation, tmp_path
):
    made = federation(**BANDED).up()
    run = made.propose()
    made.coordinator.wait_round(run, 4)  # the second block began: rounds 4, 5 and 6
    alpha = made.sites["alpha"]
    alpha.kill()
    assert len(list((alpha.folder / "state" / "memory").iterdir())) >= 2
    alpha.start()
    made.coordinator.wait_finished(run)
    assert made.as_simulated(run, tmp_path / "adapter")
    for site in made.sites.values():
        rows = [r for r in site.ledger() if r["run"] == run and r["kind"] == "charge"]
        charged = Counter((r["release"], r["round"]) for r in rows)
        assert sorted(charged) == [
            *(("block", number) for number in (1, 4, 7)),
            *(("update", number) for number in range(1, ROUNDS + 1)),
        ]
        assert set(charged.values()) == {1}
        assert {r["event"] for r in rows if r["release"] == "update"} == {'{"kind":"NoOp"}'}
