"""Shares of one Gaussian: the sum has the noise of the theory, whoever drops out."""

import math

import numpy as np
import pytest
from scipy import stats

from silotune.errors import CalibrationImpossible, SelfCheckFailed
from silotune.privacy.accounting import epsilon
from silotune.privacy.events import from_json, shared_step_event, step_event, to_json, uses_of
from silotune.privacy.noise import SeededNoise
from silotune.privacy.secagg.encoding import add_and_round

SIZE = 60_000


def summed(n, *, std, seed, values=None):
    """The sum of what n sites send, in steps of the ring."""
    values = np.zeros(SIZE) if values is None else values
    return sum(
        add_and_round(values, std=std, noise=SeededNoise(1000 * seed + site)) for site in range(n)
    )


@pytest.mark.parametrize("dropped", [0, 1, 2])
@pytest.mark.parametrize("std", [6.0, 150.0])
def test_the_sums_noise_has_the_variance_of_the_theory_at_every_number_of_dropouts(dropped, std):
    """Seven sites, threshold five: at most two drop out. False alarms: 5.5 sd, below 1e-7."""
    n, threshold = 7 - dropped, 5
    total = summed(n, std=std, seed=dropped)
    # Each share has std^2, each rounding 1/12; the noise that is accounted for is threshold * std^2.
    theory = n * (std**2 + 1 / 12)
    assert abs(total.var() / theory - 1) < 5.5 * math.sqrt(2 / SIZE)
    assert theory >= threshold * std**2


def test_the_sum_is_a_rounded_gaussian_wherever_the_values_lie():
    """Chi-square against cells of the exact law; false alarms 1e-7 each."""
    std, n = 6.0, 5
    for fraction in (0.0, 0.25, 0.5):
        values = np.full(SIZE, 1000.0 + fraction)
        total = summed(n, std=std, seed=int(8 * fraction) + 5, values=values)
        centre, spread = n * (1000.0 + fraction), math.sqrt(n * (std**2 + 1 / 12))
        edges = np.arange(-30, 31, 3) + round(centre) + 0.5
        seen = np.histogram(total, bins=[-np.inf, *edges, np.inf])[0]
        cells = np.diff(stats.norm.cdf([-np.inf, *edges, np.inf], centre, spread))
        assert stats.chisquare(seen, cells / cells.sum() * SIZE).pvalue > 1e-7


def test_the_mean_is_not_biased_by_rounding():
    """False alarms: 5.5 sd."""
    for value in (0.5, -0.25, 12345.75):
        got = add_and_round(np.full(SIZE, value), std=6.0, noise=SeededNoise(3))
        assert abs(got.mean() - value) < 5.5 * 6.0 / math.sqrt(SIZE)


def test_the_aliases_that_the_proof_drops_are_below_2_to_the_minus_250():
    from mpmath import mp, mpf

    with mp.workdps(60):
        tau = mpf(6)
        total = sum(2 * mp.exp(-(tau**2) * (mp.pi * (2 * m - 1)) ** 2 / 2) for m in range(1, 5))
        assert total < mpf(2) ** -250


@pytest.mark.parametrize("bad", [5.9, 0.0, math.nan, 1e12])
def test_noise_that_the_ring_can_not_carry_is_refused(bad):
    with pytest.raises(CalibrationImpossible):
        add_and_round(np.zeros(4), std=bad, noise=SeededNoise(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**41])
def test_a_value_out_of_range_is_refused(bad):
    with pytest.raises(SelfCheckFailed):
        add_and_round(np.array([0.0, bad]), std=10.0, noise=SeededNoise(0))


def test_noise_left_out_is_noticed():
    class Silent(SeededNoise):
        def draws(self, n):
            for start, drawn in super().draws(n):
                yield start, drawn * 0

    with pytest.raises(SelfCheckFailed, match="not what was asked"):
        add_and_round(np.zeros(1000), std=10.0, noise=Silent(0))


# --- events ------------------------------------------------------------------------------------------


def shared(**changes):
    settings = {"rate": 0.06, "sigma": 0.7, "steps": 72, "sharers": 5, "tolerated": 2, **changes}
    return shared_step_event(**settings)


def test_alone_the_coordinator_faces_the_central_mechanism():
    plain = step_event(rate=0.06, sigma=0.7, steps=72)
    assert epsilon([shared()], delta=1e-5) == epsilon([plain], delta=1e-5)


@pytest.mark.parametrize(("colluding", "honest"), [(1, 4), (2, 3), (3, 1), (99, 1)])
def test_colluding_sites_take_their_shares_with_them(colluding, honest):
    """Up to what the aggregation tolerates; beyond, only a site's own share is left."""
    weaker = step_event(rate=0.06, sigma=0.7 * math.sqrt(honest / 5), steps=72)
    assert epsilon([shared()], delta=1e-5, colluding=colluding) == pytest.approx(
        epsilon([weaker], delta=1e-5), rel=1e-12
    )


def test_a_shared_event_survives_its_json():
    event = shared()
    assert from_json(to_json(event)) == event
    assert uses_of([event]) == {(0.06, 0.7): 72}


@pytest.mark.parametrize(
    "changes",
    [{"sharers": 0}, {"sharers": 2.0}, {"tolerated": 5}, {"tolerated": -1}, {"sigma": 0.0}],
)
def test_impossible_shares_are_no_event(changes):
    from silotune.errors import EventInvalid

    with pytest.raises(EventInvalid):
        shared(**changes)
