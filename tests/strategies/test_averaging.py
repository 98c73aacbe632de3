"""The final adapter as a mean of the last ones."""

import numpy as np
import pytest

from silotune.errors import PlanInvalid
from silotune.models.layout import Layout
from silotune.plan.plan import Plan, plan_in_words
from silotune.strategies import strategy_for
from tests.strategies.contract import layout_for, plan_with

ROUNDS, HEAD_ROUNDS = 10, 4


def averaged(kind, **more) -> Plan:
    return plan_with(
        **{
            "optimizer.server.average": kind,
            "optimizer.site.head_rounds": HEAD_ROUNDS,
            "rounds.min_sites": 1,
            **more,
        }
    )


def adapters(layout: Layout):
    """An adapter a round: what a strategy's `finish` might have given."""
    rng = np.random.default_rng(3)
    found = [rng.normal(size=layout.size).astype(np.float32) for _ in range(ROUNDS)]
    start = layout.spans({"A", "B"})
    for early in found[:HEAD_ROUNDS]:  # matrices stay where they were while the head is trained
        for span in start:
            early[span.start : span.stop] = 1.0
    return found


def concluded(plan, layout, given, *, strategy=None, start=1):
    strategy = strategy or strategy_for(plan, layout=layout)
    return [
        strategy.conclude(adapter, server_round=number)
        for number, adapter in enumerate(given, start=start)
    ], strategy


def part_of(layout, flat, parts):
    return np.concatenate([flat[span.start : span.stop] for span in layout.spans(parts)])


@pytest.mark.parametrize("kind", ["none", "ema", "uniform"])
def test_sites_are_sent_the_iterates_and_the_run_ends_with_the_mean(kind):
    plan = averaged(kind)
    layout = layout_for(plan)
    given = adapters(layout)
    found, _ = concluded(plan, layout, given)
    assert all(np.array_equal(a, b) for a, b in zip(found[:-1], given[:-1], strict=True))
    assert np.array_equal(found[-1], given[-1]) == (kind == "none")


def test_a_uniform_mean_is_that_of_each_parts_own_last_rounds():
    """Half of ten rounds of the head, half of the six that trained the matrices."""
    plan = averaged("uniform")
    layout = layout_for(plan)
    given = adapters(layout)
    last = concluded(plan, layout, given)[0][-1]
    for parts, rounds in (({"head"}, 5), ({"A", "B"}, 3)):
        expected = np.mean([part_of(layout, a, parts) for a in given[-rounds:]], axis=0)
        np.testing.assert_allclose(part_of(layout, last, parts), expected, atol=1e-6)


def test_an_exponential_mean_forgets_by_the_share_of_the_rounds():
    plan = averaged("ema", **{"optimizer.server.average_share": 0.4})
    layout = layout_for(plan)
    given = adapters(layout)
    last = concluded(plan, layout, given)[0][-1]
    mean = part_of(layout, given[0], {"head"})
    for count, adapter in enumerate(given[1:], start=2):
        weight = max(1 / count, 1 / (0.4 * ROUNDS))
        mean = mean + weight * (part_of(layout, adapter, {"head"}) - mean)
    np.testing.assert_allclose(part_of(layout, last, {"head"}), mean, atol=1e-6)


@pytest.mark.parametrize("kind", ["ema", "uniform"])
def test_a_run_that_was_killed_ends_with_the_same_mean(kind):
    plan = averaged(kind)
    layout = layout_for(plan)
    given = adapters(layout)
    whole = concluded(plan, layout, given)[0][-1]
    _, strategy = concluded(plan, layout, given[:6])
    again = strategy_for(plan, layout=layout)
    again.restore({name: array.copy() for name, array in strategy.state().items()})
    rest = concluded(plan, layout, given[6:], strategy=again, start=7)[0]
    assert rest[-1].tobytes() == whole.tobytes()


def test_noise_around_a_point_is_averaged_away():
    """Independent noise in 200 rounds: the mean of the last half is nearer by a factor of about ten."""
    plan = averaged("uniform", **{"rounds.number": 200, "optimizer.site.head_rounds": 0})
    layout = layout_for(plan)
    rng = np.random.default_rng(4)
    given = [rng.normal(size=layout.size).astype(np.float32) for _ in range(200)]
    last = concluded(plan, layout, given)[0][-1]
    assert np.linalg.norm(last) < 0.2 * np.linalg.norm(given[-1])


def test_a_plan_without_it_has_the_text_and_the_state_of_before():
    plan = plan_with()
    assert "average" not in plan.canonical()
    assert set(strategy_for(plan, layout=layout_for(plan)).state()) == {"first", "second", "counts"}


@pytest.mark.parametrize("strategy", ["fedsvd", "flexlora"])
def test_matrices_that_are_factored_anew_are_not_averaged(strategy):
    several = {"rounds.local_steps": 2, "optimizer.server.name": "none"}
    changes = several if strategy == "flexlora" else {}
    with pytest.raises(PlanInvalid, match=r"optimizer\.server\.average: must be 'none'"):
        averaged("ema", **{"aggregation.strategy": strategy, **changes})


def test_the_plan_says_what_the_run_ends_with():
    said = dict(plan_in_words(averaged("uniform")))["Optimizers"]
    assert "ends with the mean of the adapters of its last 50% of rounds" in said
