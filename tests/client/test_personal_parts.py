"""Parts that stay: put in, taken out, and moved as the coordinator would have moved them."""

import numpy as np
import pytest

from silotune.client.run_files import PersonalParts, ProcessMemory
from silotune.strategies import strategy_for
from silotune.strategies.base import Terms
from tests.strategies.contract import layout_for, plan_with

FEDSA = {"aggregation.strategy": "fedsa"}
SEVERAL = {"rounds.local_steps": 4, "optimizer.server.name": "none"}


def keeping_for(**changes):
    plan = plan_with(**changes)
    batch = plan.expected_batch(1000)
    layout = layout_for(plan)
    return plan, layout, PersonalParts(plan, layout=layout, memory=ProcessMemory(), batch=batch)


def vector(layout, seed):
    return np.random.default_rng(seed).normal(size=layout.size).astype(np.float32)


def test_without_anything_to_keep_adapter_and_update_pass_through():
    _, layout, keeping = keeping_for()
    adapter, update = vector(layout, 0), vector(layout, 1)
    assert not keeping.any
    assert keeping.personal(adapter, before=5) is adapter
    assert keeping.leave(adapter, update, 1) is update


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        (FEDSA, {"B"}),
        ({"aggregation.head": "local"}, {"head"}),
        ({**FEDSA, "aggregation.head": "local"}, {"B", "head"}),
    ],
)
def test_several_steps_add_their_change_to_the_own_parts(changes, kept):
    _, layout, keeping = keeping_for(**changes, **SEVERAL)
    adapter, update = vector(layout, 0), vector(layout, 1)
    assert keeping.personal(adapter, before=1) is adapter  # nothing yet
    sent = keeping.leave(adapter, update, 1)
    mine = layout.spans(kept)
    others = layout.spans({"A", "B", "head"} - kept)
    assert sent.tobytes() == np.concatenate([update[s.start : s.stop] for s in others]).tobytes()
    newer = vector(layout, 2)
    own = keeping.personal(newer, before=2)
    for span in mine:
        where = slice(span.start, span.stop)
        np.testing.assert_array_equal(own[where], adapter[where] + update[where])
    for span in others:
        where = slice(span.start, span.stop)
        np.testing.assert_array_equal(own[where], newer[where])


def test_a_round_asked_for_again_starts_from_what_it_started_from():
    _, layout, keeping = keeping_for(**FEDSA, **SEVERAL)
    adapter = vector(layout, 0)
    keeping.leave(adapter, vector(layout, 1), 1)
    own = keeping.personal(adapter, before=2)
    first = keeping.leave(own, vector(layout, 3), 2)
    after = keeping.personal(adapter, before=3)
    again = keeping.personal(adapter, before=2)
    assert again.tobytes() == own.tobytes()
    assert keeping.leave(again, vector(layout, 3), 2).tobytes() == first.tobytes()
    assert keeping.personal(adapter, before=3).tobytes() == after.tobytes()


def test_with_one_step_own_parts_move_as_the_coordinators_optimizer_would_move_them():
    """A site alone that shares everything, and one that keeps B, go the same way."""
    plan, layout, keeping = keeping_for(**FEDSA)
    shared = strategy_for(plan_with(), layout=layout)
    apart = strategy_for(plan, layout=layout)
    site = Terms(node=1, site="s", declared_units=1000)
    whole = adapter = vector(layout, 0)
    for number in range(1, 6):
        sums = 100 * vector(layout, 10 + number)
        shared.cohort = apart.cohort = {1: site}
        shared.begin(number, whole)
        shared.fold(site, sums)
        whole = shared.finish(whole, server_round=number)
        own = keeping.personal(adapter, before=number)
        apart.begin(number, adapter)
        apart.fold(site, keeping.leave(own, sums, number))
        adapter = apart.finish(adapter, server_round=number)
    own = keeping.personal(adapter, before=6)
    np.testing.assert_allclose(own, whole, rtol=1e-4, atol=1e-6)
    assert np.abs(own - adapter).max() > 1e-4
