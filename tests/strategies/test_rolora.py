"""RoLoRA: one matrix a round, in turn, and exact in each."""

import numpy as np
import pytest

from silotune.strategies.rolora import Alternating
from tests.strategies.contract import FollowsOneSite, Streaming, cohort, plan_with
from tests.strategies.merged import merged_weights

ROLORA = {"aggregation.strategy": "rolora"}


class TestAlternating(FollowsOneSite, Streaming):
    changes = {**ROLORA, "rounds.local_steps": 4, "optimizer.server.name": "none"}

    @pytest.mark.parametrize(("number", "part", "other"), [(1, "B", "A"), (2, "A", "B")])
    def test_a_round_is_the_mean_of_one_matrix_and_leaves_the_other(self, number, part, other):
        terms, updates, start = cohort(5), self.updates(5, number=number), self.start()
        out = self.aggregate(terms, updates, adapter=start, number=number)
        weights = [t.declared_units for t in terms]
        layout = self.layout()
        mean = np.average(np.float64(updates), axis=0, weights=weights).astype(np.float32)
        want = start + layout.spread(layout.spans({part, "head"}), mean)
        np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)
        (fixed,) = layout.spans({other})
        assert (out[fixed.start : fixed.stop] == start[fixed.start : fixed.stop]).all()

    def test_the_merged_weight_is_the_mean_of_the_merged_weights(self):
        merged, mean = merged_weights(self, cohort(5), self.updates(5), self.start())
        np.testing.assert_allclose(merged, mean, rtol=0, atol=1e-6 * np.abs(mean).max())


class TestAlternatingInOneStep(Streaming):
    changes = ROLORA
    sends_sums = True

    def test_each_matrix_counts_its_own_steps(self):
        strategy = self.fresh(cohort(1))
        for number in (1, 2, 3):
            self.aggregate(
                cohort(1), self.updates(1, number=number), number=number, strategy=strategy
            )
        assert strategy.optimizer.counts == {"A": 1, "B": 2, "head": 3}


def test_b_comes_first_after_the_rounds_of_the_head():
    plan = plan_with(**ROLORA, **{"optimizer.site.head_rounds": 3})
    turns = [sorted(Alternating.trained(plan, number)) for number in range(2, 7)]
    assert turns == [["head"], ["head"], ["B", "head"], ["A", "head"], ["B", "head"]]
