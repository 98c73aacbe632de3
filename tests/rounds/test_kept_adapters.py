"""A run leaves few adapters, however long it is: the last, the best and every n-th."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.events.view import RunView
from silotune.rounds.run_directory import best, every, most_kept, spare


def scored(**by_round):
    view = RunView("r")
    for number, score in by_round.items():
        pooled = {"macro_f1": score}
        row = {"time": 1.0, "event": "evaluated", "round": int(number[1:]), "view": "simulator"}
        view.extend([{**row, "split": "validation", "pooled": pooled}])
    return view


@given(st.integers(1, 3000), st.data())
def test_the_last_the_best_and_every_nth_are_there_and_never_more(rounds, data):
    top = data.draw(st.integers(1, rounds))
    view, have = scored(**{f"r{top}": 0.9}), set()
    for number in range(1, rounds + 1):
        have.add(number)
        have -= set(spare(view, have, newest=number, rounds=rounds))
    assert {top, rounds, *range(every(rounds), rounds + 1, every(rounds))} == have
    assert len(have) <= most_kept(rounds) <= min(rounds, 22)


def test_the_best_is_by_validation_data_and_the_first_of_equals():
    view = scored(r2=0.5, r4=0.8, r6=0.8, r8=0.7)
    row = {"time": 1.0, "event": "evaluated", "round": 8, "view": "simulator", "split": "test"}
    view.extend([{**row, "pooled": {"macro_f1": 0.99}}])
    assert best(view) == 4


def test_a_lower_loss_is_better():
    view = RunView("r")
    for number, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        row = {"time": 1.0, "event": "evaluated", "round": number, "view": "simulator"}
        view.extend([{**row, "split": "validation", "pooled": {"loss": loss}}])
    assert best(view) == 2


@pytest.mark.parametrize("rounds", [1, 20])
def test_a_short_run_keeps_every_adapter(rounds):
    assert every(rounds) == 1
    assert most_kept(rounds) == rounds
