"""Fixed point: rounding is bounded and right on average, no sum overflows, nothing is cut silently."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.errors import CalibrationImpossible
from silotune.privacy.noise import SeededNoise
from silotune.privacy.secagg.encoding import LEAST_STEPS, BoundedSpan, Encoding, largest_noise


def encoding(ring="uint32", *, sizes=(3, 2), bounds=(4.0, 0.5), cohort=7):
    spans = tuple(BoundedSpan(size=s, bound=b) for s, b in zip(sizes, bounds, strict=True))
    return Encoding(ring=ring, spans=spans, cohort=cohort)


updates = st.lists(st.floats(-10, 10, width=32), min_size=5, max_size=5).map(np.array)


@settings(max_examples=200, deadline=None)
@given(
    ring=st.sampled_from(["uint32", "uint16"]),
    given_updates=st.lists(updates, min_size=1, max_size=7),
    seed=st.integers(0, 2**32),
)
def test_the_mean_of_k_updates_is_the_plain_mean_to_within_a_step(ring, given_updates, seed):
    code, noise = encoding(ring), SeededNoise(seed)
    total = code.zeros()
    for update in given_updates:
        ring_update, _ = code.encode(update, noise)
        total += ring_update
    got, saturated = code.decode(total)
    bounds = np.repeat([4.0, 0.5], (3, 2))
    steps = np.repeat([code.step(span) for span in code.spans], (3, 2))
    clipped = [
        np.clip(u, -np.floor(bounds / steps) * steps, np.floor(bounds / steps) * steps)
        for u in given_updates
    ]
    # Each number is off by less than a step: at most K steps in a sum, a step in the mean.
    assert (np.abs(got - np.sum(clipped, axis=0)) < len(given_updates) * steps).all()
    beyond = sum(int((np.abs(u) > np.floor(bounds / steps) * steps).sum()) for u in given_updates)
    assert saturated == beyond


@pytest.mark.parametrize("ring", ["uint32", "uint16"])
@pytest.mark.parametrize("cohort", [3, 7, 1000])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_cohort_of_the_largest_updates_overflows(ring, cohort, sign):
    code = encoding(ring, cohort=cohort)
    total = code.zeros()
    for site in range(cohort):
        total += code.encode(np.full(5, sign * 1e30), SeededNoise(site))[0]
    got, _ = code.decode(total)
    limits = [np.floor(s.bound / code.step(s)) * code.step(s) for s in code.spans]
    np.testing.assert_allclose(got, sign * cohort * np.repeat(limits, (3, 2)), rtol=0.05)


def test_stochastic_rounding_is_right_on_average():
    """False alarms: 5.5 standard deviations, below 1e-7."""
    code = encoding("uint16", sizes=(20_000,), bounds=(4.0,))
    step = code.step(code.spans[0])
    update = np.full(20_000, 0.3 * step)
    ring, _ = code.encode(update, SeededNoise(1))
    got, _ = code.decode(ring)
    assert abs(got.mean() / step - 0.3) < 5.5 * np.sqrt(0.3 * 0.7 / 20_000)


def test_an_update_of_another_length_is_refused():
    with pytest.raises(ValueError, match="5 numbers"):
        encoding().encode(np.zeros(4), SeededNoise(0))


@settings(max_examples=60, deadline=None)
@given(update=updates, ring=st.sampled_from(["uint32", "uint16"]), seed=st.integers(0, 1000))
def test_shared_noise_never_leaves_the_ring_and_hides_its_saturation(update, ring, seed):
    code = encoding(ring, bounds=(4.0, 4.0))
    stds = [0.2, 0.2]
    encoded, cut = code.encode_with_noise(update, stds, SeededNoise(seed))
    got, told = code.decode(encoded)
    assert told == 0  # the count is not covered by the noise, so it stays at the site
    step = code.step(code.spans[0])
    assert np.abs(got).max() <= code.largest * step
    assert (cut > 0) == (np.abs(update).max() > code._limit(code.spans[0], 0.2) * step)


def test_a_ring_too_coarse_or_too_small_for_the_noise_is_refused():
    code = encoding("uint16", sizes=(5,), bounds=(4.0,))
    fine = LEAST_STEPS * code.step(code.spans[0])
    code.require_room([fine])
    with pytest.raises(CalibrationImpossible, match="steps of the ring"):
        code.require_room([0.9 * fine])
    with pytest.raises(CalibrationImpossible, match="no room"):
        code.require_room([40.0])


def test_the_room_for_noise_is_what_the_sampler_can_reach():
    assert largest_noise(100.0) < 1030 + 2
