"""The server's optimizers are torch's and Flower's, applied to groups that count their own steps."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam
from flwr.supercore.task_identity import TaskIdentity

from silotune.models.layout import Span
from silotune.plan.left_out import adapter_lr_under_sgd, left_out, settings_of
from silotune.plan.plan import Plan
from silotune.strategies.server_optimizer import ServerOptimizer, learning_rate, phase_of
from tests.plan.test_left_out import CAUSAL
from tests.strategies.contract import plan_with

SPANS = {"B": Span("B", 0, 5), "head": Span("head", 5, 8)}


def step(optimizer, adapter, gradient, number):
    spans = [SPANS[part] for part in gradient]
    values = np.concatenate([gradient[span.part] for span in spans])
    return optimizer.step(adapter, values, spans, server_round=number)


def walk(plan, gradients):
    optimizer = ServerOptimizer(plan, size=8)
    adapter = np.zeros(8, np.float32)
    for number, gradient in enumerate(gradients, start=1):
        adapter = step(optimizer, adapter, gradient, number)
    return adapter, optimizer


def gradients(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"B": rng.normal(size=5).astype("f4"), "head": rng.normal(size=3).astype("f4")}
        for _ in range(n)
    ]


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_it_steps_as_torch_does(name):
    plan = plan_with(
        **{
            "optimizer.server.name": name,
            "optimizer.site.schedule": "constant",
            "optimizer.site.warmup_share": 0.0,
        }
    )
    steps = gradients(6)
    ours, _ = walk(plan, steps)
    parameter = torch.nn.Parameter(torch.zeros(5))
    rule = (
        torch.optim.Adam([parameter], lr=plan.optimizer.site.adapter_lr)
        if name == "adam"
        else torch.optim.SGD([parameter], lr=plan.optimizer.site.adapter_lr, momentum=0.9)
    )
    for each in steps:
        parameter.grad = torch.from_numpy(each["B"])
        rule.step()
    np.testing.assert_allclose(ours[:5], parameter.detach().numpy(), rtol=2e-5)


def flowers_step(strategy, change, number):
    """What Flower's strategy makes of an adapter of zeros and one site's change of it."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    request = Message(RecordDict(), dst_node_id=1, message_type="train")
    counted = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord({"x": Array(change)}), "metrics": counted})
    strategy.current_arrays = {"x": np.zeros_like(change)}
    reply = Message(content, reply_to=request)
    return strategy.aggregate_train(number, [reply])[0]["x"].numpy()


def test_it_steps_as_flowers_strategy_of_reddi_et_al_does():
    """Flower counts its rounds from 0."""
    plan = plan_with(
        **{
            "rounds.local_steps": 2,
            "optimizer.server": {
                "name": "adam", "lr": 0.3, "momentum": 0.8, "beta2": 0.9, "epsilon": 1e-12,
            },
        }
    )  # fmt: skip
    flower = FedAdam(eta=0.3, tau=1e-12, beta_1=0.8, beta_2=0.9)
    ours, before = ServerOptimizer(plan, size=8), np.zeros(8, np.float32)
    for count, each in enumerate(gradients(8), start=1):
        after = step(ours, before, each, count)
        change = -np.concatenate([each["B"], each["head"]])
        want = flowers_step(flower, change, count - 1)
        np.testing.assert_allclose(after - before, want, rtol=1e-3, atol=1e-6)
        before = after


def test_a_group_that_starts_late_starts_fresh():
    plan = plan_with()
    steps = gradients(6)
    late = [{"head": s["head"]} for s in steps[:3]] + steps[3:]
    _, optimizer = walk(plan, late)
    assert optimizer.counts == {"A": 0, "B": 3, "head": 6}


def test_restored_state_goes_on_bit_for_bit():
    plan, steps = plan_with(), gradients(8)
    whole, _ = walk(plan, steps)
    half, optimizer = walk(plan, steps[:4])
    fresh = ServerOptimizer(plan, size=8)
    fresh.restore({k: v.copy() for k, v in optimizer.state().items()})
    for number, each in enumerate(steps[4:], start=5):
        half = step(fresh, half, each, number)
    assert half.tobytes() == whole.tobytes()


def test_without_an_optimizer_the_mean_change_is_added():
    plan = plan_with(**{"rounds.local_steps": 3, "optimizer.server.name": "none"})
    change = {"B": np.ones(5, np.float32), "head": np.full(3, 2, np.float32)}
    ours, _ = walk(plan, [{g: -v for g, v in change.items()}])
    assert ours.tolist() == [1] * 5 + [2] * 3


def test_the_schedule_rises_then_falls_to_its_share():
    site = plan_with().optimizer.site
    values = [site.factor(step=k, steps=100) for k in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == pytest.approx(values[9])
    assert values[-1] == pytest.approx(1 - 0.8 * 0.99)
    cosine = site.model_copy(update={"schedule": "cosine"})
    assert cosine.factor(step=99, steps=100) == pytest.approx(0.2, abs=1e-3)


def test_phases_and_rates_follow_the_plan():
    plan = plan_with(**{"optimizer.site.head_rounds": 2})
    assert [phase_of(plan, n) for n in (1, 2, 3)] == ["head", "head", "adapter"]
    assert learning_rate(plan, "head", step=5) == pytest.approx(
        learning_rate(plan, "adapter", step=5)
        * plan.optimizer.site.head_lr
        / plan.optimizer.site.adapter_lr
    )


@pytest.mark.parametrize("rounds", [10, 40, 160])
def test_noise_moves_an_adapter_about_as_far_under_sgd_as_by_the_rule_under_adam(rounds):
    adam = Plan.from_mapping(CAUSAL).override({"rounds.number": rounds})
    adam = adam.override(settings_of(left_out(adam)))
    rate = adapter_lr_under_sgd(adam, noise=0.3)
    sgd = adam.override({"optimizer.server.name": "sgd", "optimizer.site.adapter_lr": rate})
    moved = []
    for plan in (adam, sgd):
        noise = np.random.default_rng(rounds)
        optimizer, adapter = ServerOptimizer(plan, size=4000), np.zeros(4000, np.float32)
        for number in range(1, rounds + 1):
            sums = 0.3 * noise.normal(size=4000).astype("f4")
            adapter = optimizer.step(adapter, sums, [Span("B", 0, 4000)], server_round=number)
        moved.append(float(adapter.std()))
    assert 0.7 < moved[1] / moved[0] < 1.1  # Adam's first steps are of one length, and so longer
