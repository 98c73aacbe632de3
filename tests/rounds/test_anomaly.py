"""Claims about anomaly scores: they find a norm unlike the others, and leave honest noise alone."""

import numpy as np
import pytest

from silotune.rounds.rounds import FEWEST, scores

LIMIT = 5.0  # the default of alerts.anomaly


def norms(count, *, spread=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return {f"s{i}": float(np.exp(rng.normal(0.0, spread))) for i in range(count)}


@pytest.mark.parametrize("factor", [50.0, 1 / 50.0, 0.0])
def test_a_norm_far_from_the_others_is_found_and_they_are_not(factor):
    found = scores({**norms(9), "liar": factor})
    assert found["liar"] > LIMIT
    assert max(value for site, value in found.items() if site != "liar") < LIMIT


def test_honest_sites_rarely_alarm():
    # For normal logs a score above 5 is beyond 5 / 0.6745 = 7.4 spreads of half the values, 5 standard
    # deviations; the median's own noise among ten sites makes it about 1 in 500 scores.
    high = total = 0
    for seed in range(300):
        found = scores(norms(10, seed=seed))
        high += sum(value > LIMIT for value in found.values())
        total += len(found)
    assert high / total < 0.01


def test_scores_do_not_depend_on_the_scale():
    given = norms(6)
    larger = {site: 1000.0 * norm for site, norm in given.items()}
    assert scores(larger) == pytest.approx(scores(given))


def test_equal_norms_and_nearly_equal_ones_are_no_anomaly():
    assert set(scores(dict.fromkeys("abcd", 2.0)).values()) == {0.0}
    assert max(scores({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.2}).values()) < LIMIT


def test_few_sites_have_no_scores():
    assert scores(norms(FEWEST - 1)) == {}
    assert scores(norms(FEWEST)) != {}
