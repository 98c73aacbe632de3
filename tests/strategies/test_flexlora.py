"""FlexLoRA: the truncated SVD of the mean of the products."""

import numpy as np

from silotune.models.layout import pairs
from tests.strategies.contract import Streaming, cohort
from tests.strategies.merged import factors, merged_weights, whole
from tests.strategies.ranks import HeterogeneousRanks

FLEX = {
    "aggregation.strategy": "flexlora",
    "rounds.local_steps": 4,
    "optimizer.server.name": "none",
}


class TestRedistributed(HeterogeneousRanks, Streaming):
    changes = FLEX

    def test_it_is_the_best_approximation_of_the_mean_product(self):
        terms, updates, start = cohort(5), self.updates(5), self.start()
        weights = [t.declared_units for t in terms]
        products = [b @ a for a, b in (factors(self, start, update) for update in updates)]
        mean = np.average(products, axis=0, weights=weights)
        U, S, Vt = np.linalg.svd(mean)
        best = (U[:, :2] * S[:2]) @ Vt[:2]
        (after,) = pairs(self.layout(), self.aggregate(terms, updates, adapter=start))
        np.testing.assert_allclose(np.float64(after.B) @ after.A, best, atol=1e-5)
        np.testing.assert_allclose(after.A @ after.A.T, np.eye(2), atol=1e-6)

    def test_one_site_alone_keeps_its_merged_weight(self):
        (update,) = self.updates(1)
        start, layout = self.start(), self.layout()
        own = start + layout.spread(layout.spans({"A", "B", "head"}), update)
        out = self.aggregate(cohort(1), [update], adapter=start)
        np.testing.assert_allclose(whole(self, out), whole(self, own), atol=1e-5)


class TestAtFullRank(Streaming):
    """Rank 6 is that of any 6 x 9 matrix: nothing is cut off."""

    changes = {**FLEX, "lora.r": 6, "lora.alpha": 12.0}

    def layout(self, **shape):
        return super().layout(**{"rank": 6, **shape})

    def test_the_merged_weight_is_the_mean_of_the_merged_weights(self):
        merged, mean = merged_weights(self, cohort(5), self.updates(5), self.start())
        np.testing.assert_allclose(merged, mean, rtol=0, atol=1e-6 * np.abs(mean).max())


class TestAboveFullRank(Streaming):
    """More directions than a matrix has: the rest of the factors is zero."""

    changes = {**FLEX, "lora.r": 8, "lora.alpha": 16.0}

    def layout(self, **shape):
        return super().layout(**{"rank": 8, **shape})
