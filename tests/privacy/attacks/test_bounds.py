"""Lower bounds from guesses: sound where the claim holds, sharp, and as jax-privacy computes them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from silotune.privacy.accounting import calibrate, epsilon
from silotune.privacy.attacks.bounds import (
    Guesses,
    audit_run,
    audit_step,
    epsilon_of,
    gaussian,
    gaussian_alone,
    gaussian_refuted,
    guess,
    steinke,
    steinke_p_value,
)
from silotune.privacy.events import gaussian_event

DELTA = 1e-5


def simulated(mu, *, canaries, seed):
    """Scores of canaries by a Gaussian mechanism, and their coins."""
    rng = np.random.default_rng(seed)
    coins = rng.random(canaries) < 0.5
    return rng.normal(size=canaries) + mu * coins, coins


def judged(mu, *, canaries, seed, claimed_mu=None):
    claimed_mu = claimed_mu or mu
    scores, coins = simulated(mu, canaries=canaries, seed=seed)
    claimed = epsilon_of(claimed_mu, delta=DELTA)
    return audit_step(scores, coins, claimed=claimed, mu=claimed_mu, delta=DELTA)


def mu_at(target):
    return 1 / calibrate(epsilon=target, delta=DELTA, rate=1.0, steps=1)


def test_the_epsilon_of_a_gaussian_is_that_of_the_accountant():
    for sigma in (0.3, 0.6, 1.0, 3.0, 20.0):
        known = epsilon([gaussian_event(sigma)], delta=DELTA)
        assert epsilon_of(1 / sigma, delta=DELTA) == pytest.approx(known, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize(("claimed", "least"), [(2.0, 0.8), (8.0, 3.0)])
def test_one_step_gives_a_bound_worth_printing_and_half_the_noise_is_a_violation(claimed, least):
    mu = mu_at(claimed)
    for seed in range(5):
        honest = judged(mu, canaries=10_000, seed=seed)
        assert least < honest.one_run < claimed
        assert 0.6 * claimed < honest.independent < claimed
        assert not honest.violated
        halved = judged(2 * mu, canaries=10_000, seed=seed, claimed_mu=mu)
        assert halved.violated
        assert halved.independent > 1.5 * claimed


def test_without_noise_every_guess_is_right_and_the_bound_grows_with_the_canaries():
    coins = np.random.default_rng(0).random(4000) < 0.5
    bounds = [
        audit_step(
            coins[:n].astype(float), coins[:n], claimed=None, mu=1.0, delta=DELTA
        ).lower_bound
        for n in (40, 400, 4000)
    ]
    assert bounds == sorted(bounds)
    assert bounds[0] > 2
    assert bounds[2] > 8


def test_an_honest_gaussian_passes_its_own_mu_at_most_as_often_as_stated():
    # 400 audits at alpha = 0.05: more than 37 false alarms have a probability below 1e-4.
    mu, alarms = 1.0, 0
    for seed in range(400):
        scores, coins = simulated(mu, canaries=300, seed=seed)
        alarms += gaussian_alone(scores, coins, threshold=0.5, alpha=0.05) > mu
    assert alarms <= 37


def test_a_mechanism_that_shows_all_coins_with_probability_delta_refutes_nothing():
    # It is (0, delta)-DP, and when it happens every guess is right.
    everything = Guesses(canaries=1000, guessed=1000, right=1000)
    assert steinke(everything, delta=0.05, alpha=0.05) == 0.0
    assert steinke(everything, delta=1e-9, alpha=0.05) > 4.0


def test_scores_that_all_move_together_do_not_alarm_the_one_run_bound():
    # One more number of noise for all canaries alike, and nothing leaks.
    for seed in range(20):
        rng = np.random.default_rng(seed)
        coins = rng.random(2000) < 0.5
        scores = 5 * rng.normal() + rng.normal(size=2000)
        found = audit_step(scores, coins, claimed=1.0, mu=0.3, delta=DELTA)
        assert found.lower_bound < 1.0


def test_a_right_guess_more_never_lowers_a_bound():
    for right in range(50, 100, 5):
        less, more = (Guesses(canaries=200, guessed=100, right=r) for r in (right, right + 5))
        assert gaussian(more, alpha=0.05) >= gaussian(less, alpha=0.05)
        assert steinke(more, delta=DELTA, alpha=0.05) >= steinke(less, delta=DELTA, alpha=0.05)


def test_one_canary_is_worth_what_the_theory_says():
    # With one guess P(right) <= e^eps / (1 + e^eps) and <= Phi(mu / 2): both can be written down.
    one = Guesses(canaries=1, guessed=1, right=1)
    assert steinke_p_value(one, epsilon=1.0, delta=0.0) == pytest.approx(1 / (1 + math.exp(-1)))
    for mu in (0.5, 1.0, 3.0):
        power = float(norm.cdf(mu / 2))
        assert gaussian_refuted(one, mu=mu, alpha=power + 1e-6)
        assert not gaussian_refuted(one, mu=mu, alpha=power - 1e-6)


def test_random_guesses_prove_nothing():
    scores, coins = simulated(0.0, canaries=2000, seed=3)
    found = audit_run(scores, coins, claimed=1.0, delta=DELTA)
    assert found.any_mechanism < 0.2
    assert not found.violated


@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(0, 30))
def test_guesses_are_counted_as_they_are_made(coins, half):
    coins = np.array(coins)
    half = min(half, len(coins) // 2)
    inside = int(coins.sum())
    perfect = guess(coins.astype(float), coins, count=2 * half)
    assert perfect.right == min(half, inside) + min(half, len(coins) - inside)


def test_an_odd_or_too_large_number_of_guesses_is_refused():
    scores, coins = simulated(1.0, canaries=10, seed=0)
    for count in (3, 12, -2):
        with pytest.raises(ValueError, match="even"):
            guess(scores, coins, count=count)
    with pytest.raises(ValueError, match="right"):
        Guesses(canaries=10, guessed=4, right=5)
