"""Percentages: what is not all or nothing never reads as if it were, whatever the rounding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.percents import likelihood, percent, said_percent


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.834, "83%"),
        (0.994, "99%"),
        (0.996, "99.6%"),
        (0.99949, "99.9%"),
        (0.99951, "above 99.9%"),
        (1 - 1e-12, "above 99.9%"),
        (0.006, "1%"),
        (0.004, "0.4%"),
        (0.0004, "under 0.1%"),
        (1e-300, "under 0.1%"),
    ],
)
def test_a_share_near_all_or_nothing_has_a_digit_more_or_a_bound(share, shown):
    assert percent(share) == likelihood(share) == shown


@given(st.floats(0.0, 1.0))
def test_all_and_nothing_are_said_of_counts_that_are_so_and_of_no_probability(value):
    assert (percent(value) in {"0%", "100%"}) == (value in {0.0, 1.0})
    assert likelihood(value) not in {"0%", "100%", "0.0%", "100.0%"}


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.1, "10%"), (1 - 0.1 - 0.2, "70%"), (0.125, "12.5%"), (0.001, "0.1%"), (0.9999, "99.99%")],
)
def test_a_share_that_somebody_chose_keeps_its_digits(share, shown):
    assert said_percent(share) == shown
