"""Requests are computed together, in time or not at all, and one of them harms no other."""

import time

import pytest

from silotune.errors import SilotuneError
from silotune.serving.batching import Batcher
from silotune.serving.errors import ServerBusy
from tests.e2e.harness import wait_for
from tests.serving.slow_model import Slow


def some(*texts):
    return [{"text": text} for text in texts]


@pytest.fixture
def slow():
    model = Slow()
    yield model
    model.go.set()


def begun(slow, **limits):
    """A batcher that has a first request under way."""
    batcher = Batcher(slow, **{"most": 9, "waiting": 9, "seconds": 30.0, **limits})
    first = batcher.ask(some("first"))
    wait_for(lambda: not batcher.waiting, what="the first batch")
    return batcher, first


def test_what_came_meanwhile_is_computed_together_up_to_the_most(slow):
    batcher, first = begun(slow, most=3)
    answers = [first, *(batcher.ask(some(text)) for text in "abcd")]
    slow.go.set()
    assert [a.result(10)[0].output for a in answers] == ["first", *"abcd"]
    assert slow.batches == [["first"], ["a", "b", "c"], ["d"]]
    batcher.close()


def test_a_full_queue_refuses_and_nothing_that_was_taken_is_lost(slow):
    batcher, first = begun(slow, most=1, waiting=2)
    taken = [batcher.ask(some("a")), batcher.ask(some("b"))]
    with pytest.raises(ServerBusy):
        batcher.ask(some("c"))
    slow.go.set()
    batcher.close()
    assert [a.result(0)[0].output for a in (first, *taken)] == ["first", "a", "b"]
    with pytest.raises(ServerBusy, match="shutting down"):
        batcher.ask(some("d"))


def test_a_request_whose_time_is_over_or_that_was_given_up_is_not_computed(slow):
    batcher, first = begun(slow, most=1, seconds=0.05)
    late, given_up = batcher.ask(some("late")), batcher.ask(some("given up"))
    assert given_up.cancel()
    time.sleep(0.06)
    slow.go.set()
    with pytest.raises(ServerBusy, match="deadline"):
        late.result(10)
    assert first.result(10)
    batcher.close()
    assert slow.batches == [["first"]]


def test_one_bad_request_does_not_fail_those_beside_it(slow):
    batcher, _ = begun(slow)
    good, bad = batcher.ask(some("good")), batcher.ask(some("bad"))
    slow.go.set()
    assert good.result(10)[0].output == "good"
    with pytest.raises(SilotuneError, match="RuntimeError"):
        bad.result(10)
    batcher.close()
