"""Numbers as people read them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.plan.counted import part_scale
from silotune.report import verdict, votes
from silotune.rounds.votes import find
from silotune.terminal import octets
from tests.vote_sites import trained, voting


@settings(deadline=None)  # other processes share this machine
@given(st.floats(0, 1000))
def test_epsilon_is_never_rounded_below_the_truth_and_by_less_than_a_hundredth(value):
    shown = float(verdict.epsilon(value))
    assert value - 2e-8 <= shown <= value + 0.0100001


def test_a_number_that_is_exact_stays_as_it_is():
    assert verdict.epsilon(7.98) == "7.98"
    assert verdict.epsilon(1.1) == "1.10"
    assert verdict.epsilon(8) == "8.00"


def test_unknown_is_a_dash():
    assert {verdict.score(None), verdict.signed(None), verdict.epsilon(None)} == {verdict.DASH}


def test_a_difference_always_has_a_sign():
    assert verdict.signed(0.0214) == "+0.021"
    assert verdict.signed(-0.0214) == "\N{MINUS SIGN}0.021"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (76_808, "76.8 kB"), (2.5e6, "2.5 MB")]
)
def test_bytes_have_a_unit(number, text):
    assert octets(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (750, "12:30"), (3900, "1:05:00")])
def test_durations_read_like_a_clock(seconds, text):
    assert verdict.clock_time(seconds) == text


@settings(deadline=None)  # other processes share this machine
@given(st.text(max_size=200))
def test_a_printable_name_has_no_control_characters_and_is_not_endless(text):
    shown = verdict.printable(text)
    assert shown.isprintable()
    assert len(shown) <= 60


def test_a_list_of_names_is_counted_where_it_is_too_long():
    assert verdict.listed(("a",)) == "a"
    assert verdict.listed(("a", "b, c", "d")) == "a; b, c and d"
    assert verdict.listed(tuple("abcdefghij"), most=3) == "a; b; c and 7 more"


def test_a_vote_is_never_certain():
    plan = voting(trained())
    sums = (np.array([900.0, 7.0, 7.0]) * part_scale(plan)).astype(np.float32)
    found = find(plan, sums, variance=2.25, sites=["a"], declared={"a": 20_000})
    assert found["probability"] > 1 - 1e-9
    said = " ".join(votes.sentences(found))
    assert "has the most votes without noise too: above 99.9%, if" in said
    assert "100%" not in said
