import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_mechanism import (
    AdjacencyType,
    GaussianPrivacyLoss,
    MixtureGaussianPrivacyLoss,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft

from silotune.privacy import loss
from silotune.privacy.loss import Sampled

RATES = st.one_of(st.just(1.0), st.floats(1e-4, 0.999))
SIGMAS = st.floats(0.4, 20.0)


@given(RATES, SIGMAS)
@settings(max_examples=25, deadline=None)
def test_deltas_of_one_use_are_those_of_dp_accounting(rate, sigma):
    epsilons = np.linspace(0.0, 8.0, 50)
    for ours, direction in [
        (loss._delta_removed, AdjacencyType.REMOVE),
        (loss._delta_added, AdjacencyType.ADD),
    ]:
        theirs = GaussianPrivacyLoss(sigma, sampling_prob=rate, adjacency_type=direction)
        expected = theirs.get_delta_for_epsilon(epsilons)
        assert np.allclose(ours(epsilons, rate, sigma), expected, rtol=1e-6, atol=2e-15)


@given(RATES, SIGMAS, st.sampled_from([1e-4, 1e-3]))
@settings(max_examples=25, deadline=None)
def test_masses_are_a_distribution_and_the_two_directions_mirror_each_other(rate, sigma, step):
    removed, added = loss.discretise(rate, sigma, step)
    for one in (removed, added):
        assert (one.masses >= 0).all()
        assert one.masses.sum() + one.infinite == pytest.approx(1.0, abs=1e-12)
    # P_removed(loss) exp(-loss) = P_added(-loss): what makes both the same pair of distributions
    assert removed.lowest == -(added.lowest + added.masses.size - 1)
    losses = step * (removed.lowest + np.arange(removed.masses.size))
    mirrored = removed.masses * np.exp(-losses)
    assert np.allclose(mirrored, added.masses[::-1], rtol=1e-9, atol=1e-12)


@given(RATES, SIGMAS)
@settings(max_examples=15, deadline=None)
def test_the_grid_never_understates_delta(rate, sigma):
    step = 1e-3
    for one, exact in zip(
        loss.discretise(rate, sigma, step), (loss._delta_removed, loss._delta_added), strict=True
    ):
        losses = step * (one.lowest + np.arange(one.masses.size))
        for epsilon in (0.0, 0.01037, 0.5, 2.0):
            above = losses > epsilon
            gain = -np.expm1(epsilon - losses[above])
            delta = one.infinite + float(one.masses[above] @ gain)
            true = float(exact(np.array([epsilon]), rate, sigma)[0])
            assert true - 1e-15 <= delta <= true + step


@pytest.mark.parametrize(
    ("rate", "sigma", "uses", "step"),
    [
        (0.06, 0.704, 72, 1e-4),
        (0.01, 1.0, 1000, 1e-4),
        (0.001, 0.5, 20000, 2e-4),
        (1.0, 50, 900, 1e-4),
    ],
)
def test_rounding_of_the_transform_is_within_what_is_charged_for_it(rate, sigma, uses, step):
    for one in loss.discretise(rate, float(sigma), step):
        low, high = loss._window([one], [uses], step)
        size = fft.next_fast_len(high - low + 1, real=True)
        folded = loss._folded(one.masses, size)
        quick = fft.irfft(fft.rfft(folded, size) ** uses, size)
        power, square, left = 1, fft.rfft(folded.astype(np.longdouble), size), uses
        while left:
            power = power * square if left & 1 else power
            square, left = square * square, left >> 1
        shift = (one.lowest * uses - low) % size
        error = np.roll(np.maximum(quick, 0) - fft.irfft(power, size), shift)
        understated = -float(np.cumsum(error[::-1]).min())
        assert understated < uses * loss._ROUNDING_MASS / 3


@given(RATES, SIGMAS, st.integers(1, 300))
@settings(max_examples=15, deadline=None)
def test_less_than_the_stated_mass_lies_outside_of_the_window(rate, sigma, uses):
    step = 1e-3
    for one in loss.discretise(rate, sigma, step):
        low, high = loss._window([one], [uses], step)
        size = 2 * (high - low) + one.masses.size
        whole = fft.irfft(fft.rfft(loss._folded(one.masses, size), size) ** uses, size)
        at_low = np.roll(whole, (one.lowest * uses - low) % size)
        assert float(at_low[high - low + 1 :].sum()) < 1e-12  # transform's own rounding


@given(st.floats(0.01, 0.5), st.floats(0.6, 4.0), st.integers(1, 200))
@settings(max_examples=6, deadline=None)
def test_a_coarser_grid_costs_more(rate, sigma, uses):
    done = [Sampled(rate, sigma, uses)]
    costs = [loss.epsilon(done, 1e-5, step=step) for step in (2.5e-4, 1e-3, 4e-3)]
    assert costs == sorted(costs)
    assert loss.epsilon(done, 1e-5) <= costs[0] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("rate", "sigma", "uses"), [(0.06, 0.704, 72), (0.001, 1.0, 1000), (0.001, 10.0, 1000)]
)
def test_the_default_grid_adds_less_than_a_ten_thousandth(rate, sigma, uses):
    done = [Sampled(rate, sigma, uses)]
    finer = loss.epsilon(done, 1e-5, step=loss.default_step(done) / 4)
    assert loss.epsilon(done, 1e-5) < finer * (1 + 1e-4)


def test_optimistic_and_pessimistic_bounds_of_dp_accounting_enclose_ours():
    for rate, sigma, uses in [(0.06, 1.1, 72), (0.3, 3.0, 40)]:
        low, high = (
            privacy_loss_distribution.from_gaussian_mechanism(
                sigma,
                sampling_prob=rate,
                pessimistic_estimate=pessimistic,
                use_connect_dots=pessimistic,
                value_discretization_interval=1e-3,
            )
            .self_compose(uses)
            .get_epsilon_for_delta(1e-5)
            for pessimistic in (False, True)
        )
        assert low < loss.epsilon([Sampled(rate, sigma, uses)], 1e-5) < high


def test_losses_too_large_for_the_grid_give_no_number():
    assert loss.epsilon([Sampled(1.0, 1e-3, 1)], 1e-5) == math.inf
    assert loss.epsilon([Sampled(0.5, 1.0, 10**9)], 1e-5) == math.inf


def test_a_delta_below_the_rounding_gives_no_number():
    assert loss.epsilon([Sampled(1.0, 5.0, 1)], 1e-16) == math.inf


# --- a person's two units ---------------------------------------------------------------------------


def drawn_of_two(rate):
    """How many of a person's two units are drawn, as a mixture of Gaussians."""
    chances = [(1 - rate) ** 2, 2 * rate * (1 - rate), rate**2]
    kept = [(n, chance) for n, chance in enumerate(chances) if chance > 0]
    return [n for n, _ in kept], [chance for _, chance in kept]


@given(RATES, SIGMAS)
@settings(max_examples=25, deadline=None)
def test_deltas_of_two_units_are_those_of_dp_accountings_mixture(rate, sigma):
    epsilons = [float(e) for e in np.linspace(0.0, 8.0, 20)]
    for ours, direction in [
        (loss._two_removed, AdjacencyType.REMOVE),
        (loss._two_added, AdjacencyType.ADD),
    ]:
        theirs = MixtureGaussianPrivacyLoss(sigma, *drawn_of_two(rate), adjacency_type=direction)
        expected = theirs.get_delta_for_epsilon(epsilons)
        assert np.allclose(ours(np.array(epsilons), rate, sigma), expected, rtol=1e-6, atol=1e-14)


def test_two_units_under_one_noise_cost_more_than_twice_one():
    """72 steps at rate .06 and sigma .7032: dp-accounting's mixture gives 17.3846 (40 s), one unit 8."""
    one = loss.epsilon([Sampled(0.06, 0.7032294, 72)], 1e-5)
    two = loss.epsilon([Sampled(0.06, 0.7032294, 72, 2)], 1e-5)
    assert two == pytest.approx(17.3846, rel=1e-4)
    assert two > 2 * one


def test_two_units_without_sampling_are_one_of_twice_the_length():
    assert loss.epsilon([Sampled(1.0, 3.0, 5, 2)], 1e-5) == pytest.approx(
        loss.epsilon([Sampled(1.0, 1.5, 5)], 1e-5), rel=1e-6
    )
