"""FLoRA: the stack of all sites' adapters goes into the frozen weights."""

import numpy as np

from silotune.strategies.factors import pairs
from tests.strategies.contract import Streaming, cohort
from tests.strategies.merged import factors
from tests.strategies.ranks import HeterogeneousRanks


class TestStacking(HeterogeneousRanks, Streaming):
    changes = {
        "aggregation.strategy": "flora",
        "rounds.local_steps": 4,
        "optimizer.server.name": "none",
    }

    def test_the_correction_is_the_product_of_the_stacks(self):
        terms, updates, start = cohort(5), self.updates(5), self.start()
        weights = np.array([t.declared_units for t in terms]) / sum(t.declared_units for t in terms)
        A, B = zip(*(factors(self, start, update) for update in updates), strict=True)
        stacked = np.hstack([w * b for w, b in zip(weights, B, strict=True)]) @ np.vstack(A)
        (after,) = pairs(self.layout(), self.aggregate(terms, updates, adapter=start))
        np.testing.assert_allclose(
            after.correction, 2.0 * stacked, rtol=0, atol=1e-6 * np.abs(stacked).max() * 2
        )

    def test_everybody_starts_anew_after_a_round(self):
        start = self.start()
        (before,) = pairs(self.layout(), start)
        (one,) = pairs(self.layout(), self.aggregate(cohort(2), self.updates(2), adapter=start))
        (two,) = pairs(
            self.layout(), self.aggregate(cohort(2), self.updates(2), adapter=start, number=2)
        )
        assert not one.B.any()
        assert (one.A != before.A).all()
        assert (one.A != two.A).any()
