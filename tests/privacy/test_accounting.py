import math
import time

import pytest
from dp_accounting import (
    ComposedDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from silotune.errors import CalibrationImpossible
from silotune.privacy import accounting
from silotune.privacy.accounting import calibrate, epsilon, epsilon_curve
from silotune.privacy.events import gaussian_event, step_event

DELTA = 1e-5
RATES = st.floats(0.005, 0.6)
SIGMAS = st.floats(0.8, 8.0)
STEPS = st.integers(1, 300)


def steps(rate, sigma, count):
    return step_event(rate=rate, sigma=sigma, steps=count)


def true_gaussian_epsilon(mu, delta):
    """One Gaussian release whose sensitivity is mu standard deviations: the exact epsilon.

    Theorem 8 of Balle and Wang, ICML 2018.
    """

    def excess(e):
        return ndtr(mu / 2 - e / mu) - math.exp(e + log_ndtr(-mu / 2 - e / mu)) - delta

    return brentq(excess, 0.0, 300.0, xtol=1e-13) if excess(0.0) > 0 else 0.0


# --- against closed forms -----------------------------------------------------------------------


@given(st.floats(0.3, 300.0), st.floats(1e-9, 1e-2))
@settings(max_examples=40, deadline=None)
def test_one_gaussian_costs_its_closed_form_and_never_less(sigma, delta):
    true = true_gaussian_epsilon(1 / sigma, delta)
    ours = epsilon([gaussian_event(sigma)], delta=delta)
    assert true <= ours <= true * (1 + 1e-4) + 1e-6


@given(st.lists(st.tuples(st.floats(2.0, 50.0), st.integers(1, 20)), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_composed_gaussians_cost_the_closed_form_of_the_one_they_amount_to(parts):
    events = [SelfComposedDpEvent(gaussian_event(sigma), n) for sigma, n in parts]
    mu = math.sqrt(sum(n / sigma**2 for sigma, n in parts))
    true = true_gaussian_epsilon(mu, DELTA)
    assert true <= epsilon(events, delta=DELTA) <= true * (1 + 1e-4) + 1e-6


@given(RATES, st.floats(0.4, 8.0), st.floats(1e-8, 1e-3))
@settings(max_examples=15, deadline=None)
def test_one_sampled_step_costs_its_closed_form_and_never_less(rate, sigma, delta):
    ours = epsilon([steps(rate, sigma, 1)], delta=delta)
    for direction in (AdjacencyType.REMOVE, AdjacencyType.ADD):
        exact = GaussianPrivacyLoss(sigma, sampling_prob=rate, adjacency_type=direction)
        assert exact.get_delta_for_epsilon(ours) <= delta * (1 + 1e-9)
    exact = GaussianPrivacyLoss(sigma, sampling_prob=rate)
    if ours > 1e-3:
        assert exact.get_delta_for_epsilon(ours * (1 - 1e-3)) > delta


@pytest.mark.parametrize(("sigma", "count"), [(5.0, 72), (1.0, 1), (40.0, 1000)])
def test_sampling_everybody_is_no_sampling(sigma, count):
    plain = epsilon([gaussian_event(sigma)] * count, delta=DELTA)
    assert epsilon([steps(1.0, sigma, count)], delta=DELTA) == plain
    assert epsilon([steps(1 - 1e-12, sigma, count)], delta=DELTA) == pytest.approx(plain, rel=1e-4)


def test_nothing_costs_nothing():
    assert epsilon([], delta=DELTA) == 0.0
    assert epsilon([NoOpDpEvent(), ComposedDpEvent([])], delta=DELTA) == 0.0


# --- against other accountants ------------------------------------------------------------------


# Opacus 1.6: RDPAccountant and PRVAccountant (whose own error bound is 0.01); dp-accounting 0.6:
# PLDAccountant.
TABLE = [
    (0.001, 1.0, 1000, 0.678, 0.159, 0.149),
    (0.01, 1.0, 1000, 2.101, 1.838, 1.828),
    (0.01, 0.6, 1000, 8.666, 7.444, 7.434),
    (0.1, 1.0, 100, 7.899, 7.057, 7.047),
    (0.1, 1.0, 1000, 27.164, 25.216, 25.205),
]


@pytest.mark.parametrize(("rate", "sigma", "count", "rdp", "prv", "pld"), TABLE)
def test_epsilon_agrees_with_a_table_of_three_accountants(rate, sigma, count, rdp, prv, pld):
    ours = epsilon([steps(rate, sigma, count)], delta=DELTA)
    assert ours == pytest.approx(pld, abs=6e-4)
    assert prv - 0.021 < ours < prv
    assert ours < rdp


@pytest.mark.parametrize(
    "history",
    [
        [(1.1, 0.06, 72)],
        [(1.0, 0.01, 100), (2.0, 0.05, 30), (8.0, 1.0, 2)],
    ],
)
def test_epsilon_lies_between_the_lower_and_upper_bounds_of_opacus(history):
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = history
    ours = epsilon([steps(q, sigma, n) for sigma, q, n in history], delta=DELTA)
    estimate = prv.get_epsilon(DELTA)  # an upper bound, at most 0.02 above a lower one
    assert estimate - 0.021 < ours < estimate + 1e-6
    assert ours < rdp.get_epsilon(DELTA)


@pytest.mark.parametrize(
    "parts", [[(0.3, 3.0, 40)], [(0.06, 2.0, 72), (0.2, 4.0, 7)], [(0.02, 1.4, 500)]]
)
def test_epsilon_is_that_of_dp_accounting_with_metrics_or_without(parts):
    for extra in ([], [gaussian_event(9.0)] * 3):
        events = [steps(*part) for part in parts] + extra
        theirs = PLDAccountant()
        theirs.compose(ComposedDpEvent(events))
        assert epsilon(events, delta=DELTA) == pytest.approx(theirs.get_epsilon(DELTA), rel=1e-6)


# --- algebra ------------------------------------------------------------------------------------


@given(RATES, SIGMAS, STEPS, st.floats(1.01, 1.5))
@settings(max_examples=8, deadline=None)
def test_more_steps_cost_more_more_noise_less_and_rarer_sampling_less(rate, sigma, count, factor):
    cost = epsilon([steps(rate, sigma, count)], delta=DELTA)
    floor = 1 if cost > 0 else 0
    assert epsilon([steps(rate, sigma, count + 1)], delta=DELTA) >= cost
    assert epsilon([steps(rate, sigma * factor, count)], delta=DELTA) <= cost * (1 + 1e-9)
    assert epsilon([steps(rate / factor, sigma, count)], delta=DELTA) <= cost * (1 + 1e-9)
    assert epsilon([steps(rate, sigma, count)], delta=DELTA * factor) <= cost * floor


@given(st.lists(st.tuples(RATES, SIGMAS, st.integers(2, 20)), min_size=2, max_size=3))
@settings(max_examples=10, deadline=None)
def test_neither_order_nor_grouping_matters_to_the_last_bit(parts):
    events = [steps(*part) for part in parts]
    metrics = [gaussian_event(3.0), gaussian_event(7.0)] * 2
    one = epsilon([*events, *metrics], delta=DELTA)
    singly = [
        PoissonSampledDpEvent(q, gaussian_event(s)) for q, s, n in reversed(parts) for _ in range(n)
    ]
    assert epsilon([*reversed(metrics), ComposedDpEvent(singly)], delta=DELTA) == one


@given(RATES, SIGMAS, STEPS, RATES, SIGMAS, STEPS)
@settings(max_examples=6, deadline=None)
def test_mixed_events_cost_more_than_each_and_less_than_simple_addition(q1, s1, n1, q2, s2, n2):
    one, two = steps(q1, s1, n1), steps(q2, s2, n2)
    alone = [epsilon([event], delta=DELTA) for event in (one, two)]
    both = epsilon([one, two], delta=DELTA)
    assert max(alone) <= both
    # Basic composition, with half of delta each.
    assert both <= sum(epsilon([e], delta=DELTA / 2) for e in (one, two)) * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta):
    with pytest.raises(ValueError, match="delta"):
        epsilon([gaussian_event(1.0)], delta=delta)


# --- where the grid can't certify ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "delta", "looseness"), [(5.0, 1e-15, 1.1), (2.0, 1e-40, 1.1), (0.002, 1e-5, 2.0)]
)
def test_what_the_grid_can_not_certify_is_bounded_by_renyi_divergences(sigma, delta, looseness):
    # For one Gaussian: the closed form's own lower and upper bounds, mu^2/2 + mu z(1 - delta).
    mu = 1 / sigma
    low = mu**2 / 2 if mu > 1 else true_gaussian_epsilon(mu, delta)
    high = mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    assert low <= epsilon([gaussian_event(sigma)], delta=delta) < looseness * high


def test_rounding_does_not_make_a_bound_of_many_tiny_releases_zero():
    event = steps(1e-5, 1e3, 10**6)
    bound = accounting._from_renyi(10**6 * accounting._renyi(1e-5, 1e3), DELTA)
    assert bound >= epsilon([event], delta=DELTA)


# --- calibration --------------------------------------------------------------------------------


@given(
    st.floats(0.2, 20.0),
    st.sampled_from([1e-3, 1e-5, 1e-8]),
    st.one_of(st.just(1.0), st.floats(0.005, 0.6)),
    st.integers(1, 2000),
)
@settings(max_examples=6, deadline=None)
def test_sigma_keeps_the_budget_and_a_thousandth_less_does_not(budget, delta, rate, count):
    sigma = calibrate(epsilon=budget, delta=delta, rate=rate, steps=count)
    assert epsilon([steps(rate, sigma, count)], delta=delta) <= budget
    assert sigma == 0.1 or epsilon([steps(rate, sigma * 0.999, count)], delta=delta) > budget


def test_sigma_makes_room_for_other_releases():
    metrics = [gaussian_event(20.0)] * 6
    plain = calibrate(epsilon=3.0, delta=DELTA, rate=0.06, steps=72)
    sigma = calibrate(epsilon=3.0, delta=DELTA, rate=0.06, steps=72, extra=metrics)
    assert sigma > plain * 1.005
    assert epsilon([steps(0.06, sigma, 72), *metrics], delta=DELTA) <= 3.0
    assert epsilon([steps(0.06, sigma * 0.999, 72), *metrics], delta=DELTA) > 3.0


def test_sigma_is_that_of_the_closed_form_for_one_gaussian():
    sigma = calibrate(epsilon=1.0, delta=DELTA, rate=1.0, steps=1)
    exact = brentq(lambda s: true_gaussian_epsilon(1 / s, DELTA) - 1.0, 1.0, 10.0)
    assert exact <= sigma <= exact * 1.001


def test_other_releases_that_use_the_budget_up_are_refused():
    with pytest.raises(CalibrationImpossible, match="other releases alone"):
        calibrate(epsilon=1.0, delta=DELTA, rate=0.1, steps=5, extra=[gaussian_event(1.0)])


def test_an_epsilon_out_of_reach_is_refused():
    with pytest.raises(CalibrationImpossible, match="out of reach"):
        calibrate(epsilon=1e-6, delta=1e-9, rate=1.0, steps=10**6)


def test_a_huge_epsilon_still_gets_some_noise():
    assert calibrate(epsilon=1e4, delta=DELTA, rate=0.01, steps=1) == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"epsilon": math.inf}, {"delta": 0.0}])
def test_a_budget_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        calibrate(**{"epsilon": 1.0, "delta": DELTA, "rate": 0.1, "steps": 5} | wrong)


def test_calibration_is_remembered_and_costs_about_a_second_at_most():
    accounting._calibrate.cache_clear()
    accounting._epsilon.cache_clear()
    started = time.thread_time()
    first = calibrate(epsilon=8.0, delta=DELTA, rate=0.0613, steps=72)
    assert time.thread_time() - started < 3.0  # 0.3 s on an idle core
    again = []
    for _ in range(3):
        started = time.thread_time()
        assert calibrate(epsilon=8.0, delta=DELTA, rate=0.0613, steps=72) == first
        again.append(time.thread_time() - started)
    assert min(again) < 0.01


# --- round by round -----------------------------------------------------------------------------


def test_epsilon_grows_with_each_round_to_that_of_the_whole():
    history, last = [], 0.0
    for round_number in range(10):
        history += [steps(0.06, 0.9 if round_number < 5 else 1.4, 2), gaussian_event(25.0)]
        now = epsilon(history, delta=DELTA)
        assert last < now
        last = now
    assert last == epsilon([ComposedDpEvent(history)], delta=DELTA)


def test_a_round_costs_little_to_account_for():
    event, certified = steps(0.06, 0.704, 1), []
    epsilon([event], delta=DELTA)  # the first round discretises the mechanism
    for rounds in range(2, 14):
        started = time.process_time()
        epsilon([event] * rounds, delta=DELTA)
        certified.append(time.process_time() - started)
    assert min(certified) < 0.150  # 0.02 s on an idle core; medians would measure the neighbours


def test_the_curve_of_a_run_ends_at_its_total():
    event = steps(0.06, 1.0, 1)
    curve = epsilon_curve(event, rounds=30, points=4, delta=DELTA)
    assert [n for n, _ in curve] == [1, 11, 20, 30]
    assert curve[-1][1] == epsilon([steps(0.06, 1.0, 30)], delta=DELTA)
    assert [e for _, e in curve] == sorted(e for _, e in curve)
    assert [n for n, _ in epsilon_curve(event, rounds=3, points=10, delta=DELTA)] == [1, 2, 3]
