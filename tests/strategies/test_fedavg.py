"""FedAvg is its formula, in both of its forms."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from silotune.errors import UpdateRejected
from silotune.strategies import strategy_for
from silotune.strategies.base import as_arrays, update_of
from tests.strategies.contract import LAYOUT, SIZE, StrategyContract, cohort, plan_with


class TestOneStep(StrategyContract):
    changes = {"optimizer.server.name": "sgd", "optimizer.server.momentum": 0.0}
    sends_sums = True

    def test_it_is_the_pooled_gradient_step(self):
        terms, updates = cohort(5), self.updates(5)
        out = self.aggregate(terms, updates)
        pooled = np.sum(np.float64(updates), axis=0) / sum(
            0.1 * 0.7 * t.declared_units for t in terms
        )
        plan = plan_with(**self.changes)
        site = plan.optimizer.site
        rates = np.where(np.arange(SIZE) < 30, site.adapter_lr, site.head_lr)  # one warm-up step
        np.testing.assert_allclose(out, -rates * pooled, rtol=1e-5, atol=1e-9)


class TestSeveralSteps(StrategyContract):
    changes = {"rounds.local_steps": 4, "optimizer.server.name": "none"}
    sends_sums = False

    def test_it_is_the_mean_change_by_declared_units(self):
        terms, updates = cohort(5), self.updates(5)
        weights = [t.declared_units for t in terms]
        want = np.average(np.float64(updates), axis=0, weights=weights)
        np.testing.assert_allclose(self.aggregate(terms, updates), want, rtol=1e-6, atol=1e-9)

    def test_one_site_alone_is_followed_exactly(self):
        update = self.updates(1)
        assert self.aggregate(cohort(1), update).tobytes() == update[0].tobytes()


class TestEqualWeights(TestSeveralSteps):
    changes = {**TestSeveralSteps.changes, "aggregation.weights": "equal"}

    def test_it_is_the_mean_change_by_declared_units(self):
        terms, updates = cohort(5), self.updates(5)
        want = np.mean(np.float64(updates), axis=0)
        np.testing.assert_allclose(self.aggregate(terms, updates), want, rtol=1e-6, atol=1e-9)


def test_head_rounds_carry_and_change_the_head_alone():
    plan = plan_with(**{"optimizer.site.head_rounds": 2})
    strategy = strategy_for(plan, layout=LAYOUT)
    terms = cohort(1)
    strategy.cohort = {t.node: t for t in terms}
    assert strategy.update_size(1) == 10
    assert strategy.update_size(3) == SIZE
    strategy.begin(1, np.zeros(SIZE, np.float32))
    strategy.fold(terms[0], np.ones(10, np.float32))
    out = strategy.finish(np.zeros(SIZE, np.float32), server_round=1)
    assert not out[:30].any()
    assert out[30:].all()


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
    assert update_of(reply_with(as_arrays(good))).tolist() == [0, 1, 2]
    for bad in (
        ArrayRecord({"other": as_arrays(good)["flat"]}),
        ArrayRecord([good, good]),
    ):
        with pytest.raises(UpdateRejected, match="no single array"):
            update_of(reply_with(bad))
    from flwr.app import Array

    with pytest.raises(UpdateRejected, match="float64"):
        update_of(reply_with(ArrayRecord({"flat": Array(np.ones(3))})))
    with pytest.raises(UpdateRejected, match="2 dimensions"):
        update_of(reply_with(ArrayRecord({"flat": Array(np.ones((3, 1), np.float32))})))


def test_flowers_own_aggregation_call_gives_the_same_as_folding():
    plan = plan_with(**{"optimizer.server.name": "sgd", "optimizer.server.momentum": 0.0})
    terms = cohort(2)
    updates = StrategyContract().updates(2)

    def fresh():
        strategy = strategy_for(plan, layout=LAYOUT)
        strategy.cohort = {t.node: t for t in terms}
        return strategy

    replies = []
    for one, update in zip(terms, updates, strict=True):
        reply = reply_with(as_arrays(update))
        reply.metadata.__dict__["_src_node_id"] = one.node
        replies.append(reply)
    arrays, _ = fresh().aggregate_train(1, replies)
    folded = fresh()
    folded.begin(1, np.zeros(SIZE, np.float32))
    for one, update in zip(terms, updates, strict=True):
        folded.fold(one, update)
    want = folded.finish(np.zeros(SIZE, np.float32), server_round=1)
    assert arrays["flat"].numpy().tobytes() == want.tobytes()
    messages = list(fresh().configure_train(1, arrays, ConfigRecord(), None))
    assert [m.metadata.dst_node_id for m in messages] == [t.node for t in terms]
