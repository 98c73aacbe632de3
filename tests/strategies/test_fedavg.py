"""FedAvg is its formula, in both of its forms."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from silotune.errors import UpdateRejected
from silotune.protocol.replies import TrainReply
from silotune.protocol.requests import as_arrays
from silotune.strategies import strategy_for
from tests.strategies.contract import (
    FollowsOneSite,
    StrategyContract,
    Streaming,
    cohort,
    layout_for,
    plan_with,
)
from tests.strategies.merged import factors, merged_weights


class TestOneStep(Streaming):
    changes = {"optimizer.server.name": "sgd", "optimizer.server.momentum": 0.0}
    sends_sums = True

    def test_it_is_the_pooled_gradient_step(self):
        terms, updates, start = cohort(5), self.updates(5), self.start()
        out = self.aggregate(terms, updates, adapter=start)
        pooled = np.sum(np.float64(updates), axis=0) / sum(
            0.1 * 0.7 * t.declared_units for t in terms
        )
        site = self.plan.optimizer.site
        head = np.arange(len(start)) >= len(start) - 10
        rates = np.where(head, site.head_lr, site.adapter_lr)  # one warm-up step
        np.testing.assert_allclose(out - start, -rates * pooled, rtol=1e-3, atol=1e-6)


class TestSeveralSteps(FollowsOneSite, Streaming):
    changes = {"rounds.local_steps": 4, "optimizer.server.name": "none"}

    def test_it_is_the_mean_change_by_declared_units(self):
        terms, updates, start = cohort(5), self.updates(5), self.start()
        weights = [t.declared_units for t in terms]
        want = start + np.average(np.float64(updates), axis=0, weights=weights)
        got = self.aggregate(terms, updates, adapter=start)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)

    def test_the_merged_weight_is_not_the_mean_of_the_merged_weights(self):
        """Its stated inexactness: off by the weighted covariance of the factors."""
        terms, updates, start = cohort(5), self.updates(5), self.start()
        merged, mean = merged_weights(self, terms, updates, start)
        weights = np.array([t.declared_units for t in terms], dtype=np.float64)
        weights /= weights.sum()
        A, B = map(np.array, zip(*(factors(self, start, u) for u in updates), strict=True))
        away_A, away_B = (m - np.average(m, axis=0, weights=weights) for m in (A, B))
        spread = np.einsum("k,kor,kri->oi", weights, away_B, away_A)
        assert np.abs(spread).max() > 0.5
        np.testing.assert_allclose(mean - merged, 2.0 * spread, atol=1e-5)


class TestEqualWeights(FollowsOneSite):
    changes = {**TestSeveralSteps.changes, "aggregation.weights": "equal"}

    def test_it_is_the_plain_mean_change(self):
        terms, updates, start = cohort(5), self.updates(5), self.start()
        want = start + np.mean(np.float64(updates), axis=0)
        got = self.aggregate(terms, updates, adapter=start)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_sum_from_elsewhere_counts_as_the_replies_it_is_made_of(steps):
    """What secure aggregation hands over in place of the replies."""
    plan = plan_with(**{"rounds.local_steps": steps})
    layout, terms = layout_for(plan), cohort(4)
    start = np.zeros(layout.size, np.float32)
    updates = np.random.default_rng(0).normal(size=(4, layout.size)).astype(np.float32)

    def fresh():
        strategy = strategy_for(plan, layout=layout)
        strategy.cohort = {t.node: t for t in terms}
        strategy.begin(1, start)
        return strategy

    one, other = fresh(), fresh()
    for term, update in zip(terms, updates, strict=True):
        one.fold(term, update)
    weights = [other.weight(term) for term in terms]
    total = sum(w.factor * np.float64(u) for w, u in zip(weights, updates, strict=True))
    other.fold_sum(total, mass=sum(w.mass for w in weights))
    got, want = (s.finish(start, server_round=1) for s in (other, one))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    bad = np.full(layout.size, np.nan)
    with pytest.raises(UpdateRejected, match="the cohort's sum"):
        other.fold_sum(bad, mass=1.0)
    with pytest.raises(UpdateRejected, match="expected"):
        other.fold_sum(bad[1:], mass=1.0)


def update_in(reply):
    return TrainReply.read(reply.content).update


def reply_with(arrays):
    order = Message(RecordDict(), dst_node_id=1, message_type="train")
    order.metadata.__dict__["_message_id"] = "m"
    return Message(RecordDict({"update": arrays}), reply_to=order)


@pytest.fixture(autouse=True)
def task_identity():
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


def test_an_update_is_one_flat_float32_array_and_nothing_else():
    good = np.arange(3, dtype=np.float32)
    assert update_in(reply_with(as_arrays(good))).tolist() == [0, 1, 2]
    for bad in (
        ArrayRecord({"other": as_arrays(good)["flat"]}),
        ArrayRecord([good, good]),
    ):
        with pytest.raises(UpdateRejected, match="no single array"):
            update_in(reply_with(bad))
    from flwr.app import Array

    with pytest.raises(UpdateRejected, match="float64"):
        update_in(reply_with(ArrayRecord({"flat": Array(np.ones(3))})))
    with pytest.raises(UpdateRejected, match="2 dimensions"):
        update_in(reply_with(ArrayRecord({"flat": Array(np.ones((3, 1), np.float32))})))


def test_flowers_own_aggregation_call_gives_the_same_as_folding():
    plan = plan_with(**{"optimizer.server.name": "sgd", "optimizer.server.momentum": 0.0})
    terms = cohort(2)
    layout = layout_for(plan)
    updates = StrategyContract().updates(2)

    def fresh():
        strategy = strategy_for(plan, layout=layout)
        strategy.cohort = {t.node: t for t in terms}
        return strategy

    replies = []
    for one, update in zip(terms, updates, strict=True):
        reply = reply_with(as_arrays(update))
        reply.metadata.__dict__["_src_node_id"] = one.node
        replies.append(reply)
    arrays, _ = fresh().aggregate_train(1, replies)
    folded = fresh()
    folded.begin(1, np.zeros(layout.size, np.float32))
    for one, update in zip(terms, updates, strict=True):
        folded.fold(one, update)
    want = folded.finish(np.zeros(layout.size, np.float32), server_round=1)
    assert arrays["flat"].numpy().tobytes() == want.tobytes()
    messages = list(fresh().configure_train(1, arrays, ConfigRecord(), None))
    assert [m.metadata.dst_node_id for m in messages] == [t.node for t in terms]
