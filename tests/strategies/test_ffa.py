"""FFA-LoRA: only B travels, and its mean is exact."""

import numpy as np

from tests.strategies.contract import FollowsOneSite, Streaming, cohort, layout_for, plan_with
from tests.strategies.merged import merged_weights

FFA = {"aggregation.strategy": "ffa"}


class TestFrozenA(FollowsOneSite, Streaming):
    changes = {**FFA, "rounds.local_steps": 4, "optimizer.server.name": "none"}

    def test_it_is_the_mean_of_b(self):
        terms, updates, start = cohort(5), self.updates(5), self.start()
        weights = [t.declared_units for t in terms]
        want = start + np.average(np.float64(updates), axis=0, weights=weights)
        np.testing.assert_allclose(
            self.aggregate(terms, updates, adapter=start), want, rtol=1e-6, atol=1e-6
        )

    def test_the_merged_weight_is_the_mean_of_the_merged_weights(self):
        merged, mean = merged_weights(self, cohort(5), self.updates(5), self.start())
        np.testing.assert_allclose(merged, mean, rtol=0, atol=1e-6 * np.abs(mean).max())


class TestFrozenAInOneStep(Streaming):
    changes = FFA
    sends_sums = True


def test_nothing_of_a_travels_in_either_direction():
    assert not layout_for(plan_with(**FFA)).spans({"A"})
    plain, frozen = layout_for(plan_with()), layout_for(plan_with(**FFA))
    assert plain.size - frozen.size == 2 * 9
