"""FedEx-LoRA: means of the factors, and exactly what they get wrong in the correction."""

import numpy as np

from silotune.strategies.factors import pairs
from tests.strategies.contract import FollowsOneSite, Streaming, cohort
from tests.strategies.merged import factors, merged_weights


class TestExactResidual(FollowsOneSite, Streaming):
    changes = {
        "aggregation.strategy": "fedex",
        "rounds.local_steps": 4,
        "optimizer.server.name": "none",
    }

    def test_it_is_the_formula_of_the_paper(self):
        terms, updates, start = cohort(5), self.updates(5), self.start()
        weights = [t.declared_units for t in terms]
        A, B = zip(*(factors(self, start, update) for update in updates), strict=True)
        mean_A, mean_B = (np.average(m, axis=0, weights=weights) for m in (A, B))
        products = [b @ a for a, b in zip(A, B, strict=True)]
        residual = np.average(products, axis=0, weights=weights) - mean_B @ mean_A
        (after,) = pairs(self.layout(), self.aggregate(terms, updates, adapter=start))
        np.testing.assert_allclose(after.A, mean_A, atol=1e-6)
        np.testing.assert_allclose(after.B, mean_B, atol=1e-6)
        np.testing.assert_allclose(after.correction, 2.0 * residual, atol=1e-5)

    def test_the_merged_weight_is_the_mean_of_the_merged_weights(self):
        merged, mean = merged_weights(self, cohort(5), self.updates(5), self.start())
        np.testing.assert_allclose(merged, mean, rtol=0, atol=1e-6 * np.abs(mean).max())

    def test_corrections_add_up_over_rounds(self):
        terms, strategy = cohort(3), self.fresh(cohort(3))
        one = self.aggregate(terms, self.updates(3), strategy=strategy)
        two = self.aggregate(terms, self.updates(3, seed=2), adapter=one, strategy=strategy)
        fresh = one.copy()
        (span,) = self.layout().spans({"correction"})
        fresh[span.start : span.stop] = 0
        alone = self.aggregate(terms, self.updates(3, seed=2), adapter=fresh)
        where = slice(span.start, span.stop)
        np.testing.assert_allclose(two[where], one[where] + alone[where], atol=1e-5)
