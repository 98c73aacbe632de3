"""Which sites a round asks: a uniform draw that a resumed run repeats."""

import math
from collections import Counter

import pytest

from silotune.plan.plan import Plan
from silotune.rounds.draw import drawn

NAMES = [f"s{number}" for number in range(12)]


def plan_of(sites, *, seed=None):
    return Plan.from_mapping(
        {
            "plan": {"name": "t", "purpose": "t", **({} if seed is None else {"seed": seed})},
            "model": {"base": "x", "task": "text_classification", "labels": ["a", "b"]},
            "data": {"dataset": "d"},
            "rounds": {"number": 4, "min_sites": 1, **({"sites": sites} if sites else {})},
            "privacy": {"mode": "none", "rate": 0.1},
        }
    )


def draw(plan, number, names=NAMES, *, run="r"):
    return drawn(plan, run=run, server_round=number, sites=names)


def test_a_plan_without_the_key_and_a_run_of_fewer_sites_ask_everybody():
    assert draw(plan_of(None), 1) == set(NAMES)
    assert draw(plan_of(12), 1) == set(NAMES)
    assert draw(plan_of(50), 1) == set(NAMES)


def test_a_draw_is_the_same_again_whatever_the_order_and_another_one_in_the_next_round():
    plan = plan_of(5)
    first = draw(plan, 1)
    assert len(first) == 5
    assert draw(plan, 1, NAMES[::-1]) == first
    assert len({draw(plan, number) for number in range(1, 9)}) > 1


def test_a_seed_decides_alone_and_without_one_the_run_does():
    assert draw(plan_of(5, seed=3), 1, run="a") == draw(plan_of(5, seed=3), 1, run="b")
    assert draw(plan_of(5, seed=3), 1) != draw(plan_of(5, seed=4), 1)
    assert draw(plan_of(5), 1, run="a") != draw(plan_of(5), 1, run="b")


def test_a_site_that_is_gone_is_replaced_by_one_other_and_nobody_else_changes():
    plan = plan_of(5)
    before = draw(plan, 2)
    gone = min(before)
    after = draw(plan, 2, [name for name in NAMES if name != gone])
    assert before - {gone} < after
    assert len(after) == 5


@pytest.mark.parametrize("seed", [7, None])
def test_every_site_and_every_pair_of_sites_is_drawn_as_often_as_a_uniform_draw_has_it(seed):
    """78 counts, each within 5.5 standard deviations: by chance fewer than one in 100,000 runs fails
    (2 * 78 * 1.9e-8 by the normal tail; the draws are fixed, so that it never flickers)."""
    plan, rounds = plan_of(5, seed=seed), 2000
    draws = [draw(plan, number) for number in range(1, rounds + 1)]
    alone = Counter(name for found in draws for name in found)
    pairs = Counter((a, b) for found in draws for a in found for b in found if a < b)
    for counts, share, expected in ((alone, 5 / 12, 12), (pairs, 5 / 12 * 4 / 11, 66)):
        assert len(counts) == expected
        spread = 5.5 * math.sqrt(rounds * share * (1 - share))
        assert max(abs(n - rounds * share) for n in counts.values()) < spread
