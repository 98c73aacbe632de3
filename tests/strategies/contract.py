"""What every strategy must do: a suite to inherit, and the plans and replies it needs."""

import json
import tracemalloc
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from silotune.errors import UpdateRejected
from silotune.models.layout import ArrayEntry, Layout
from silotune.plan.plan import Plan
from silotune.protocol.replies import records_of
from silotune.strategies import method_of, strategy_for
from silotune.strategies.base import Terms

IN, OUT, RANK = 9, 6, 2


def layout_for(plan, *, inputs=IN, outputs=OUT, rank=RANK, layers=1):
    """The layout that a model would derive from the plan, of some adapted layers and a head."""
    entries = []
    for n in range(layers):
        stem = f"base_model.model.layer.{n}"
        if not plan.freezes_a:
            entries.append(ArrayEntry(f"{stem}.lora_A.weight", (rank, inputs), "adapter"))
        entries.append(ArrayEntry(f"{stem}.lora_B.weight", (outputs, rank), "adapter"))
    entries += [ArrayEntry("head.weight", (2, 4), "head"), ArrayEntry("head.bias", (2,), "head")]
    return Layout(tuple(entries))


def plan_with(**changes):
    raw = {
        "plan": {"name": "test", "purpose": "test", "seed": 3},
        "model": {"base": "x", "task": "text_classification", "labels": ["a", "b"]},
        "lora": {"r": RANK, "alpha": 4.0},
        "data": {"dataset": "d"},
        "rounds": {"number": 10, "min_sites": 7},
        "privacy": {"mode": "none", "rate": 0.1},
    }
    return Plan.from_mapping(raw).override(changes)


def cohort(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Terms(node=10 + i, site=f"s{i:04d}", declared_units=int(rng.integers(50, 5000)))
        for i in range(n)
    ]


def evaluated(node, counts):
    """A node's reply with its counts."""
    asked = Message(RecordDict(), dst_node_id=node, message_type="evaluate")
    return Message(records_of({"counts": counts}, {}), reply_to=asked)


class StrategyContract:
    """Inherit and set `changes`, the plan settings that select the strategy."""

    changes: dict = {}
    sends_sums = False
    least = 1  # sites without which the rule has no meaning

    @property
    def plan(self):
        return plan_with(**self.changes)

    def layout(self, **shape):
        return layout_for(self.plan, **shape)

    def fresh(self, terms, layout=None):
        strategy = strategy_for(self.plan, layout=layout or self.layout())
        strategy.cohort = {t.node: t for t in terms}
        return strategy

    def start(self, layout=None, seed=5):
        layout = layout or self.layout()
        return np.random.default_rng(seed).normal(size=layout.size).astype(np.float32)

    def aggregate(self, terms, updates, *, adapter=None, layout=None, number=1, strategy=None):
        strategy = strategy or self.fresh(terms, layout)
        start = self.start(strategy.layout) if adapter is None else adapter
        strategy.begin(number, start)
        for one, update in zip(terms, updates, strict=True):
            strategy.fold(one, update)
        return strategy.finish(start, server_round=number)

    def updates(self, n, seed=1, layout=None, number=1):
        layout = layout or self.layout()
        size = strategy_for(self.plan, layout=layout).update_size(number)
        return list(np.random.default_rng(seed).normal(size=(n, size)).astype(np.float32))

    def several(self, n):
        return max(n, self.least)

    def test_the_order_of_replies_changes_no_bit(self):
        n = self.several(6)
        terms, updates = cohort(n), self.updates(n)
        order = list(np.random.default_rng(9).permutation(n))
        one = self.aggregate(terms, updates)
        other = self.aggregate([terms[i] for i in order], [updates[i] for i in order])
        assert one.tobytes() == other.tobytes()

    def test_nor_does_it_where_the_divisor_could_depend_on_it(self):
        """Batches and shares that add up to another float in another order; means between two floats."""
        n, layout = self.several(3), self.layout(inputs=100, outputs=100, layers=8)
        units = [330, 30, 360] * (1 + n // 3)
        assert 330 / 360 + 30 / 360 + 1.0 != 1.0 + 330 / 360 + 30 / 360
        terms = [replace(t, declared_units=u) for t, u in zip(cohort(n), units, strict=False)]
        updates, orders = self.updates(n, layout=layout), list(permutations(range(n)))
        found = {
            self.aggregate([terms[i] for i in o], [updates[i] for i in o], layout=layout).tobytes()
            for o in orders[:: 1 + len(orders) // 8]
        }
        assert len(found) == 1

    def test_nor_does_it_change_a_metric(self):
        counts = np.random.default_rng(4).normal(50.0, 20.0, size=(3, 2, 2))
        replies = [evaluated(node, table) for node, table in enumerate(counts, start=1)]
        strategy = self.fresh(cohort(self.several(3)))
        found = {
            json.dumps(dict(strategy.aggregate_evaluate(1, order)), sort_keys=True)
            for order in permutations(replies)
        }
        assert len(found) == 1

    def test_scaling_all_declared_sizes_changes_nothing(self):
        n = self.several(4)
        terms, updates = cohort(n), self.updates(n)
        one = self.aggregate(terms, updates)
        bigger = [replace(t, declared_units=t.declared_units * 2) for t in terms]
        scale = 2.0 if self.sends_sums else 1.0  # twice the records, twice the sums
        other = self.aggregate(bigger, [u * np.float32(scale) for u in updates])
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)

    def test_type_and_shape_are_kept(self):
        n = self.several(3)
        out = self.aggregate(cohort(n), self.updates(n))
        assert out.dtype == np.float32
        assert out.shape == (self.layout().size,)

    def test_what_is_not_sent_is_not_changed(self):
        n, start = self.several(3), self.start()
        out = self.aggregate(cohort(n), self.updates(n), adapter=start)
        kept = self.layout().spans(method_of(self.plan).kept(self.plan))
        for span in kept:
            where = slice(span.start, span.stop)
            assert out[where].tobytes() == start[where].tobytes()

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_an_update_that_is_not_finite_is_rejected_with_its_site(self, bad):
        terms, updates = cohort(2), self.updates(2)
        updates[1][7] = bad
        with pytest.raises(UpdateRejected, match="site s0001"):
            self.aggregate(terms, updates)

    def test_an_update_of_another_length_is_rejected_with_its_site(self):
        terms, updates = cohort(2), self.updates(2)
        with pytest.raises(UpdateRejected, match="site s0000"):
            self.aggregate(terms, [updates[0][:-1], updates[1]])

    def test_a_rejected_reply_leaves_the_others_as_if_it_never_came(self):
        n = self.several(3)
        terms, updates, start = cohort(n), self.updates(n), self.start()
        strategy = self.fresh(terms)
        strategy.begin(1, start)
        for number, (one, update) in enumerate(zip(terms, updates, strict=True)):
            if number == 1:
                bad = update.copy()
                bad[-1] = np.nan
                with pytest.raises(UpdateRejected):
                    strategy.fold(one, bad)
            else:
                strategy.fold(one, update)
        got = strategy.finish(start, server_round=1)
        left = [i for i in range(n) if i != 1]
        strategy = self.fresh(terms)  # the cohort is the same: one of it dropped out
        want = self.aggregate(
            [terms[i] for i in left],
            [updates[i] for i in left],
            adapter=start,
            strategy=strategy,
        )
        assert got.tobytes() == want.tobytes()

    def test_no_reply_leaves_the_adapter_as_it_was(self):
        adapter = self.start()
        assert self.aggregate([], [], adapter=adapter).tobytes() == adapter.tobytes()

    def test_a_run_resumed_after_any_round_goes_on_bit_for_bit(self):
        n = self.several(3)
        terms = cohort(n)

        def walk(strategy, adapter, rounds):
            for number in rounds:
                strategy.begin(number, adapter)
                for one, update in zip(
                    terms, self.updates(n, seed=number, number=number), strict=True
                ):
                    strategy.fold(one, update * np.float32(0.01))
                adapter = strategy.finish(adapter, server_round=number)
            return adapter

        whole = walk(self.fresh(terms), self.start(), range(1, 6))
        first = self.fresh(terms)
        half = walk(first, self.start(), range(1, 4))
        saved = {name: array.copy() for name, array in first.state().items()}
        second = self.fresh(terms)
        second.restore(saved)
        assert walk(second, half, range(4, 6)).tobytes() == whole.tobytes()

    def test_head_rounds_carry_and_change_the_head_alone(self):
        plan = self.plan.override({"optimizer.site.head_rounds": 2})
        layout = layout_for(plan)
        strategy = strategy_for(plan, layout=layout)
        n = self.several(2)
        terms = cohort(n)
        strategy.cohort = {t.node: t for t in terms}
        size = strategy.update_size(1)
        assert size == 10 + (strategy.update_size(3) - self._plain_size(strategy, 3))
        start = self.start(layout)
        strategy.begin(1, start)
        for one in terms:
            strategy.fold(one, np.full(size, 0.1, np.float32))
        out = strategy.finish(start, server_round=1)
        assert out[:-10].tobytes() == start[:-10].tobytes()
        assert (out[-10:] != start[-10:]).all()

    def _plain_size(self, strategy, number):
        return sum(span.stop - span.start for span in strategy.spans(number))


class FollowsOneSite(StrategyContract):
    """For strategies that average plain changes: one site alone is followed exactly."""

    def test_one_site_alone_is_followed_exactly(self):
        (update,) = self.updates(1)
        start, layout = self.start(), self.layout()
        out = self.aggregate(cohort(1), [update], adapter=start)
        sent = layout.spans(method_of(self.plan).sent(self.plan, 1))
        np.testing.assert_allclose(out, start + layout.spread(sent, update), rtol=1e-6, atol=1e-6)


class Streaming(StrategyContract):
    """For all but those that hold every update: memory is flat in the cohort."""

    def test_memory_does_not_grow_from_10_to_1000_replies(self):
        layout = self.layout(inputs=100, outputs=80, layers=6)
        (update,) = self.updates(1, layout=layout)
        update *= np.float32(0.1)
        start = self.start(layout)

        def peak(n):
            terms, updates = cohort(n), [update] * n
            strategy = self.fresh(terms, layout)
            tracemalloc.start()
            self.aggregate(terms, updates, adapter=start, strategy=strategy)
            grown = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return grown

        # Python itself keeps up to 2,000 small tuples for later use: a fortieth of the replies' bytes.
        # Of two, since what a thread of an earlier test takes meanwhile is counted, too.
        most = min(peak(1000), peak(1000))
        assert most - peak(10) < 0.05 * 990 * update.nbytes
