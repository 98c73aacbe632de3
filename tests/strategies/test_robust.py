"""Robust rules are their formulas, and two liars of seven don't move them."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import trim_mean

from tests.strategies.contract import FollowsOneSite, cohort

SEVERAL = {
    "rounds.local_steps": 4,
    "optimizer.server.name": "none",
    "aggregation.weights": "equal",
}


class Robust(FollowsOneSite):
    """Each: one vote a site, whatever it declares."""

    least = 7

    def combined(self, n=7, seed=1):
        """Updates, and what came of them."""
        start = self.start()
        updates = self.updates(n, seed=seed)
        return np.float64(updates), self.aggregate(cohort(n), updates, adapter=start) - start

    def test_what_a_site_declares_makes_no_difference(self):
        updates, start = self.updates(7), self.start()
        outs = [self.aggregate(cohort(7, seed=s), updates, adapter=start) for s in (0, 1)]
        assert outs[0].tobytes() == outs[1].tobytes()


class TestMedian(Robust):
    changes = {**SEVERAL, "aggregation.strategy": "median"}

    def test_it_is_the_median_of_each_coordinate(self):
        updates, got = self.combined()
        np.testing.assert_allclose(got, np.sort(updates, axis=0)[3], atol=1e-6)


class TestMedianInOneStep(Robust):
    changes = {"aggregation.weights": "equal", "aggregation.strategy": "median"}
    sends_sums = True
    test_one_site_alone_is_followed_exactly = None  # it sends a gradient sum
    test_what_a_site_declares_makes_no_difference = None  # its gradient sum is for so many units


class TestTrimmedMean(Robust):
    changes = {**SEVERAL, "aggregation.strategy": "trimmed_mean", "aggregation.trim": 0.3}

    def test_it_is_scipys_trimmed_mean(self):
        updates, got = self.combined()
        np.testing.assert_allclose(got, trim_mean(updates, 0.3, axis=0), atol=1e-6)


def krum_order(updates, liars):
    """Blanchard et al., literally: the sum of squared distances to the n - f - 2 closest others."""
    n = len(updates)
    scores = []
    for i in range(n):
        others = sorted(np.sum((updates[i] - updates[j]) ** 2) for j in range(n) if j != i)
        scores.append(sum(others[: n - liars - 2]))
    return np.argsort(scores, kind="stable")


class TestMultiKrum(Robust):
    changes = {
        **SEVERAL,
        "aggregation.strategy": "multi_krum",
        "aggregation.byzantine": 2,
        "aggregation.selected": 4,
    }

    def test_it_is_the_mean_of_the_four_best(self):
        for seed in range(5):
            updates, got = self.combined(seed=seed)
            np.testing.assert_allclose(
                got, updates[krum_order(updates, 2)[:4]].mean(axis=0), atol=1e-6
            )


class TestGeometricMedian(Robust):
    changes = {**SEVERAL, "aggregation.strategy": "geometric_median"}

    def test_no_point_has_a_smaller_sum_of_distances(self):
        updates, got = self.combined()

        def distances(point):
            return np.linalg.norm(updates - point, axis=1).sum()

        best = minimize(distances, updates.mean(axis=0), method="BFGS", options={"gtol": 1e-7})
        assert distances(np.float64(got)) <= best.fun * (1 + 1e-7)
        np.testing.assert_allclose(got, best.x, atol=1e-3)


@pytest.mark.parametrize("case", [TestMedian, TestTrimmedMean, TestMultiKrum, TestGeometricMedian])
def test_two_of_seven_sites_can_not_drag_the_aggregate_away(case):
    suite = case()
    truth = np.random.default_rng(0).normal(size=len(suite.updates(1)[0]))
    honest = [truth + 0.1 * u for u in np.float64(suite.updates(5))]
    lies = [-1e4 * truth, 1e4 * truth]
    start = suite.start()
    got = (
        suite.aggregate(cohort(7), [np.float32(u) for u in [*honest, *lies]], adapter=start) - start
    )
    assert np.linalg.norm(got - truth) < 0.3 * np.linalg.norm(truth)
