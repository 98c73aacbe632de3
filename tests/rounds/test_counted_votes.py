"""What a vote's noisy sum says: who is chosen, and how probable it is that the noise did not choose."""

import numpy as np
import pytest

from silotune.plan.counted import part_scale
from silotune.rounds.votes import find, leads
from tests.vote_sites import trained, voting


def test_the_probability_is_that_of_the_true_winner_given_the_noisy_votes():
    """200,000 draws: a share is off by more than .006 once in a million."""
    rng = np.random.default_rng(1)
    for votes in ([20.0, 14.0, 3.0], [5.0, 5.0], [1.0, 9.0, 8.0, 8.5]):
        noisy, noise = np.array(votes), 4.0
        true = noisy - rng.normal(0.0, noise, (200_000, len(noisy)))
        for one in range(len(noisy)):
            share = float((true.argmax(axis=1) == one).mean())
            assert leads(noisy, one, noise=noise) == pytest.approx(share, abs=0.006)


def test_votes_are_counted_in_blocks_and_the_first_of_equals_is_chosen():
    plan = voting(trained())
    sums = (np.array([4.0, 7.0, 7.0]) * part_scale(plan)).astype(np.float32)
    found = find(plan, sums, variance=2.25, sites=["a"], declared={"a": 100})
    assert [one["votes"] for one in found["candidates"]] == pytest.approx([4.0, 7.0, 7.0])
    assert found["noise"] == pytest.approx(1.5 * 2**0.5, rel=1e-5)
    assert (found["chosen"], found["settings"]) == (2, {"optimizer.site.head_lr": 1e-6})
    assert found["sites"] == {"a": {"declared_units": 100, "blocks": 7}}
    assert found["probability"] == pytest.approx(0.47, abs=0.03)
    assert found["plan"] == "small"


def test_without_noise_who_leads_leads():
    assert leads(np.array([3.0, 1.0]), 0, noise=0.0) == 1.0
    assert leads(np.array([3.0, 1.0]), 1, noise=0.0) == 0.0
