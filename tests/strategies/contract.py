"""What every strategy must do: a suite to inherit, and the plans and replies it needs."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from silotune.errors import UpdateRejected
from silotune.models.layout import Entry, Layout
from silotune.plan import Plan
from silotune.strategies import strategy_for
from silotune.strategies.base import Terms

IN, OUT, RANK = 9, 6, 2
LAYOUT = Layout(
    (
        Entry("base_model.model.layer.0.lora_A.weight", (RANK, IN), "adapter"),
        Entry("base_model.model.layer.0.lora_B.weight", (OUT, RANK), "adapter"),
        Entry("head.weight", (2, 4), "head"),
        Entry("head.bias", (2,), "head"),
    )
)
SIZE = LAYOUT.size  # 18 + 12 + 10


def plan_with(**changes):
    raw = {
        "plan": {"name": "test", "purpose": "test"},
        "model": {"base": "x", "task": "text_classification", "labels": ["a", "b"]},
        "data": {"dataset": "d"},
        "rounds": {"number": 10},
        "privacy": {"mode": "none", "rate": 0.1},
    }
    return Plan.from_mapping(raw).override(changes)


def cohort(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Terms(node=10 + i, site=f"s{i}", declared_units=int(rng.integers(50, 5000)))
        for i in range(n)
    ]


class StrategyContract:
    """Inherit and set `changes`, the plan settings that select the strategy."""

    changes: dict = {}

    def aggregate(self, terms, updates, *, adapter=None, layout=LAYOUT, number=1):
        strategy = strategy_for(plan_with(**self.changes), layout=layout)
        strategy.cohort = {t.node: t for t in terms}
        start = np.zeros(layout.size, np.float32) if adapter is None else adapter
        strategy.begin(number, start)
        for one, update in zip(terms, updates, strict=True):
            strategy.fold(one, update)
        return strategy.finish(start, server_round=number)

    def updates(self, n, seed=1, size=SIZE):
        return list(np.random.default_rng(seed).normal(size=(n, size)).astype(np.float32))

    def test_the_order_of_replies_changes_no_bit(self):
        terms, updates = cohort(6), self.updates(6)
        order = [3, 1, 5, 0, 4, 2]
        one = self.aggregate(terms, updates)
        other = self.aggregate([terms[i] for i in order], [updates[i] for i in order])
        assert one.tobytes() == other.tobytes()

    def test_scaling_all_declared_sizes_changes_nothing(self):
        terms, updates = cohort(4), self.updates(4)
        one = self.aggregate(terms, updates)
        bigger = [replace(t, declared_units=t.declared_units * 2) for t in terms]
        scale = 2.0 if self.sends_sums else 1.0  # twice the records, twice the sums
        other = self.aggregate(bigger, [u * np.float32(scale) for u in updates])
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)

    def test_type_and_shape_are_kept(self):
        out = self.aggregate(cohort(3), self.updates(3))
        assert out.dtype == np.float32
        assert out.shape == (SIZE,)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_an_update_that_is_not_finite_is_rejected_with_its_site(self, bad):
        terms, updates = cohort(2), self.updates(2)
        updates[1][7] = bad
        with pytest.raises(UpdateRejected, match="site s1"):
            self.aggregate(terms, updates)

    def test_an_update_of_another_length_is_rejected_with_its_site(self):
        terms, updates = cohort(2), self.updates(2)
        with pytest.raises(UpdateRejected, match="site s0"):
            self.aggregate(terms, [updates[0][:-1], updates[1]])

    def test_a_rejected_reply_leaves_the_others_as_if_it_never_came(self):
        terms, updates = cohort(3), self.updates(3)
        strategy = strategy_for(plan_with(**self.changes), layout=LAYOUT)
        strategy.cohort = {t.node: t for t in terms}
        strategy.begin(1, np.zeros(SIZE, np.float32))
        strategy.fold(terms[0], updates[0])
        with pytest.raises(UpdateRejected):
            strategy.fold(terms[1], np.full(SIZE, np.nan, np.float32))
        strategy.fold(terms[2], updates[2])
        got = strategy.finish(np.zeros(SIZE, np.float32), server_round=1)
        present = [terms[0], terms[2]]
        strategy = strategy_for(plan_with(**self.changes), layout=LAYOUT)
        strategy.cohort = {t.node: t for t in terms}
        strategy.begin(1, np.zeros(SIZE, np.float32))
        for one, update in zip(present, [updates[0], updates[2]], strict=True):
            strategy.fold(one, update)
        want = strategy.finish(np.zeros(SIZE, np.float32), server_round=1)
        assert got.tobytes() == want.tobytes()

    def test_no_reply_leaves_the_adapter_as_it_was(self):
        adapter = np.arange(SIZE, dtype=np.float32)
        assert self.aggregate([], [], adapter=adapter).tobytes() == adapter.tobytes()

    def test_memory_does_not_grow_with_the_cohort(self):
        size = 200_000
        layout = Layout((Entry("x.lora_B.weight", (size // 10, 10), "adapter"),))
        update = np.random.default_rng(0).normal(size=size).astype(np.float32)

        def peak(n):
            terms = cohort(n)
            tracemalloc.start()
            self.aggregate(terms, [update] * n, layout=layout)
            grown = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return grown

        assert peak(300) < 1.1 * peak(10)
