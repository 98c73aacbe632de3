"""The running sum is exact on its grid and deaf to order."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from silotune.strategies import linear
from silotune.strategies.linear import ReproducibleSum

VECTORS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(2, 12), st.integers(1, 9)),
    elements=st.floats(-1000, 1000, width=32),
)


def total(rows, weights, exponent=-26):
    running = ReproducibleSum(rows.shape[1], exponent=exponent)
    for row, weight in zip(rows, weights, strict=True):
        running.add(row, weight)
    return running


@given(VECTORS, st.randoms(use_true_random=False))
def test_every_order_gives_the_same_bits(rows, random):
    weights = [random.uniform(0, 3) for _ in rows]
    order = list(range(len(rows)))
    random.shuffle(order)
    one = total(rows, weights).value(7.0)
    other = total(rows[order], [weights[i] for i in order]).value(7.0)
    assert one.tobytes() == other.tobytes()


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32 - 1), st.booleans())
def test_no_bit_depends_on_where_blocks_end(size, block, seed, weighted):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3, size), scale=100.0 ** rng.integers(-3, 2, size)).astype(np.float32)
    weights = rng.uniform(0, 3, 3) if weighted else np.ones(3)
    whole = total(rows, weights).mean(7.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_BLOCK", block)
        cut = total(rows, weights)
        assert cut.mean(7.0).tobytes() == whole.tobytes()
        bad = rows[0].copy()
        bad[seed % size] = np.inf
        with pytest.raises(ValueError, match="infinite"):
            cut.add(bad, 0.5)
        assert cut.mean(7.0).tobytes() == whole.tobytes()


@given(VECTORS)
def test_it_differs_from_the_exact_sum_by_half_a_grid_step_a_term(rows):
    exact = [sum(Fraction(float(x)) for x in column) for column in rows.T]
    got = total(rows, np.ones(len(rows))).mean(1.0)
    for have, want in zip(got, exact, strict=True):
        assert abs(Fraction(float(have)) - want) <= len(rows) * Fraction(1, 2**27)


def test_4096_terms_of_the_largest_size_still_sum_exactly():
    running = ReproducibleSum(1, exponent=-26)
    term = np.float32(16383.5)
    for _ in range(4096):
        running.add(np.array([term], np.float32))
    assert running.value(4096.0)[0] == term


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_what_the_grid_cannot_hold_is_refused_and_changes_nothing(bad):
    running = total(np.ones((1, 3), np.float32), [1.0])
    with pytest.raises(ValueError, match="NaN, infinite or beyond"):
        running.add(np.array([1, bad, 1], np.float32))
    assert running.value(1.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("place", [0, 20_000, 69_999])
def test_a_number_that_is_refused_late_leaves_no_trace_of_those_before_it(place):
    rows = np.random.default_rng(0).normal(size=(2, 70_000)).astype(np.float32)
    running = total(rows, [1.0, 0.5])
    before = running.value(1.0).tobytes()
    bad = rows[0].copy()
    bad[place] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        running.add(bad, 0.7)
    assert running.value(1.0).tobytes() == before


def test_another_length_is_refused():
    with pytest.raises(ValueError, match="expected 3 numbers, got 2"):
        ReproducibleSum(3, exponent=-26).add(np.ones(2, np.float32))


def test_long_vectors_are_summed_whole_across_blocks():
    rows = np.random.default_rng(0).normal(size=(3, 100_001)).astype(np.float32)
    np.testing.assert_allclose(total(rows, [1, 2, 3]).value(1.0), rows.T @ [1, 2, 3], atol=1e-6)


def test_sums_from_elsewhere_are_added_on_the_same_grid():
    rows = np.random.default_rng(0).normal(size=(5, 1000)).astype(np.float32)
    weights = [0.3, 1.0, 0.9, 0.1, 0.5]
    ours = total(rows, weights)
    others = total(rows[:2], weights[:2])
    others.add_total(np.float64(rows[2:]).T @ weights[2:])
    np.testing.assert_allclose(others.mean(1.0), ours.mean(1.0), rtol=0, atol=3 * 2.0**-26)
    with pytest.raises(ValueError, match="NaN"):
        others.add_total(np.full(1000, np.nan))
