"""SCAFFOLD at a site: the paper's recursion, with nothing but adapters travelling."""

import numpy as np

from silotune.client.run_files import ControlVariate, ProcessMemory
from silotune.strategies.server_optimizer import learning_rate
from tests.strategies.contract import layout_for, plan_with

SCAFFOLD = {
    "aggregation.strategy": "scaffold",
    "rounds.local_steps": 3,
    "optimizer.server.name": "none",
    "optimizer.site.local": "sgd",
    "aggregation.weights": "equal",
}


def quadratic(seed, size):
    """A site's loss: its gradient at a point."""
    rng = np.random.default_rng(seed)
    curve, best = rng.uniform(0.5, 2.0, size), rng.normal(size=size)
    return lambda point: curve * (point - best)


def rates(plan, layout, number, step):
    made = []
    for span in layout.spans({"A", "B", "head"}):
        group = "head" if span.part == "head" else "adapter"
        rate = learning_rate(plan, group, step=(number - 1) * 3 + step)
        made.append(np.full(span.stop - span.start, rate))
    return np.concatenate(made)


def test_four_rounds_are_those_of_algorithm_1_with_option_2():
    plan = plan_with(**SCAFFOLD)
    layout = layout_for(plan)
    losses = [quadratic(seed, layout.size) for seed in range(3)]
    controls = [ControlVariate(plan, layout=layout, memory=ProcessMemory()) for _ in losses]
    ours = np.zeros(layout.size, np.float32)
    x, c = np.zeros(layout.size), np.zeros(layout.size)
    own = [np.zeros(layout.size) for _ in losses]
    for number in range(1, 5):
        changes = []
        for loss, control in zip(losses, controls, strict=True):
            drift, point = control.drift(ours, number), ours.astype(np.float64)
            for step in range(3):
                point = point - rates(plan, layout, number, step) * (loss(point) + drift)
            change = (point - ours).astype(np.float32)
            control.learn(ours, change, number)
            changes.append(change)
        ours = ours + np.mean(changes, axis=0)
        # Karimireddy et al., literally: y <- y - eta (g - c_i + c); c_i+ = c_i - c + (x - y) / (K eta).
        ends, fresh = [], []
        for loss, mine in zip(losses, own, strict=True):
            y = x.copy()
            for step in range(3):
                y = y - rates(plan, layout, number, step) * (loss(y) - mine + c)
            travel = sum(rates(plan, layout, number, step) for step in range(3))
            ends.append(y)
            fresh.append(mine - c + (x - y) / travel)
        c = c + np.mean([f - o for f, o in zip(fresh, own, strict=True)], axis=0)
        x, own = np.mean(ends, axis=0), fresh
        np.testing.assert_allclose(ours, x, rtol=1e-4, atol=1e-5)
    assert np.abs(x).max() > 1e-3


def test_after_a_missed_round_and_between_phases_a_site_starts_without_correction():
    plan = plan_with(**SCAFFOLD, **{"optimizer.site.head_rounds": 2})
    layout = layout_for(plan)
    control = ControlVariate(plan, layout=layout, memory=ProcessMemory())
    adapter = np.ones(layout.size, np.float32)
    assert not control.drift(adapter, 1).any()
    control.learn(adapter, np.full(10, 0.1, np.float32), 1)
    assert control.drift(adapter + 1, 2).any()
    control.learn(adapter, np.full(10, 0.1, np.float32), 2)
    assert control.drift(adapter + 1, 3).shape == (layout.size,)
    assert not control.drift(adapter + 1, 3).any()
    control.learn(adapter, np.full(layout.size, 0.1, np.float32), 3)
    assert control.drift(adapter + 1, 4).any()
    assert not control.drift(adapter + 1, 5).any()
