"""FedSA-LoRA: A and the head travel, B stays."""

import numpy as np

from tests.strategies.contract import FollowsOneSite, Streaming, cohort

FEDSA = {"aggregation.strategy": "fedsa"}


class TestKeptB(FollowsOneSite, Streaming):
    changes = {**FEDSA, "rounds.local_steps": 4, "optimizer.server.name": "none"}

    def test_it_is_the_mean_of_a_and_head(self):
        terms, updates, start = cohort(5), self.updates(5), self.start()
        assert len(updates[0]) == 18 + 10
        weights = [t.declared_units for t in terms]
        mean = np.average(np.float64(updates), axis=0, weights=weights).astype(np.float32)
        layout = self.layout()
        want = start + layout.spread(layout.spans({"A", "head"}), mean)
        got = self.aggregate(terms, updates, adapter=start)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


class TestKeptBInOneStep(Streaming):
    changes = FEDSA
    sends_sums = True


class TestLocalHead(FollowsOneSite):
    """Any strategy may leave the head at the sites."""

    changes = {
        "aggregation.head": "local",
        "rounds.local_steps": 4,
        "optimizer.server.name": "none",
    }
    test_head_rounds_carry_and_change_the_head_alone = None  # there are none: the plan is refused

    def test_the_head_neither_travels_nor_changes(self):
        start = self.start()
        updates = self.updates(3)
        assert len(updates[0]) == 18 + 12
        out = self.aggregate(cohort(3), updates, adapter=start)
        assert out[-10:].tobytes() == start[-10:].tobytes()
