"""Figures and tests of an evaluation, held to scikit-learn and to slow ground truths."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

from silotune.inference.calibration import calibration_of, fitted_temperature, tempered
from silotune.inference.figures import Bootstrap, Classified
from silotune.inference.groups import shown_groups
from silotune.inference.significance import areas_under, delong, mcnemar
from silotune.inference.thresholds import ThresholdRule

LABELS = ("a", "b", "c")


def classified(seed=0, n=120, ties=False):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, n)
    logits = rng.normal(0, 1, (n, 3)) + 1.2 * np.eye(3)[truth]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if ties:
        shares = np.round(shares, 1)
    return Classified(truth=truth, shares=shares, names=LABELS)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_quick_figures_of_a_draw_are_scikit_learns(seed, ties):
    found = classified(seed, ties=ties)
    rows = np.random.default_rng(seed).integers(0, 120, 150)
    quick, exact = found.measure(rows), found.point(rows)
    truth, shares = found.truth[rows], found.shares[rows]
    scores = precision_recall_fscore_support(
        truth, shares.argmax(1), labels=range(3), zero_division=np.nan
    )
    for place, name in enumerate(LABELS):
        is_it, score = truth == place, shares[:, place]
        expected = {
            "auroc": roc_auc_score(is_it, score),
            "average_precision": average_precision_score(is_it, score),
            **dict(zip(("precision", "recall", "f1"), (s[place] for s in scores), strict=False)),
        }
        for key, value in expected.items():
            assert quick[f"{key}/{name}"] == pytest.approx(value, abs=1e-12)
            assert exact[f"{key}/{name}"] == pytest.approx(value, abs=1e-12)
    assert quick["accuracy"] == pytest.approx((truth == shares.argmax(1)).mean())


def test_a_draw_takes_units_with_all_of_their_records():
    units = np.array([0, 1, 1, 2, 2, 2, 3, 0])
    draws = list(Bootstrap(draws=300)._draws(units))
    sizes = Counter(units.tolist())
    taken = Counter()
    for rows in draws:
        times = Counter(units[rows].tolist())
        assert all(number % sizes[unit] == 0 for unit, number in times.items())
        whole = {unit: number // sizes[unit] for unit, number in times.items()}
        assert sum(whole.values()) == 4
        for unit, number in whole.items():
            own = Counter(row for row in rows.tolist() if units[row] == unit)
            assert set(own.values()) == {number}
        taken.update(whole)
    # 1200 draws of four units: each 300 in expectation, its deviation 15; beyond 5 of them 1 in 10^6.
    assert all(225 < taken[unit] < 375 for unit in range(4))


def test_intervals_are_those_of_the_figures_of_all_draws():
    found, units = classified(), np.arange(120) // 3
    bootstrap = Bootstrap(draws=200, confidence=0.9, seed=4)
    figures = bootstrap.figures(found, np.arange(120), units)
    slow = []
    for rows in bootstrap._draws(units):
        slow.append(roc_auc_score(found.truth[rows] == 1, found.shares[rows, 1]))
    assert figures["auroc/b"].low == pytest.approx(np.quantile(slow, 0.05))
    assert figures["auroc/b"].high == pytest.approx(np.quantile(slow, 0.95))


def test_repeated_records_of_a_unit_are_no_further_evidence():
    """Each record ten times in its unit gives the interval of once; as units of their own a third."""
    once, every = classified(), np.repeat(np.arange(120), 10)
    many = Classified(truth=once.truth[every], shares=once.shares[every], names=LABELS)
    bootstrap = Bootstrap(draws=400)

    def width(observed, units):
        found = bootstrap.figures(observed, np.arange(len(units)), units)["accuracy"]
        return found.high - found.low

    alone = width(once, np.arange(120))
    assert width(many, every) == pytest.approx(alone, rel=1e-9)
    assert width(many, np.arange(1200)) < 0.5 * alone


def slow_areas(positive, scores):
    """DeLong's areas and covariance by every pair of a positive and another record."""
    pairs = [
        [[(a > b) + 0.5 * (a == b) for b in model[~positive]] for a in model[positive]]
        for model in scores
    ]
    psi = np.array(pairs)
    areas = psi.mean((1, 2))
    of_positive, of_negative = psi.mean(2), psi.mean(1)
    m, n = psi.shape[1:]
    covariance = np.zeros((2, 2))
    for r, s in product(range(2), repeat=2):
        first = ((of_positive[r] - areas[r]) * (of_positive[s] - areas[s])).sum() / (m - 1)
        second = ((of_negative[r] - areas[r]) * (of_negative[s] - areas[s])).sum() / (n - 1)
        covariance[r, s] = first / m + second / n
    return areas, covariance


@pytest.mark.parametrize("digits", [1, 8])
@pytest.mark.parametrize("seed", range(4))
def test_delong_by_ranks_is_delong_by_pairs(seed, digits):
    rng = np.random.default_rng(seed)
    positive = np.concatenate([[True, True, False, False], rng.random(40) < 0.4])
    scores = np.round(rng.random((2, 44)) + 0.4 * positive, digits)
    areas, covariance = areas_under(positive, scores)
    expected, slow = slow_areas(positive, scores)
    np.testing.assert_allclose(areas, expected, atol=1e-12)
    np.testing.assert_allclose(covariance, slow, atol=1e-12)
    assert areas[0] == pytest.approx(roc_auc_score(positive, scores[0]))


def test_delong_keeps_its_level_under_the_null():
    """Two equally good scores: p < .05 in about one case of twenty.

    Of 400 cases 20 are expected, with a deviation of 4.4; outside 3 to 45 less often than 1 in 10^4.
    """
    rng, rejected = np.random.default_rng(1), 0
    for _ in range(400):
        positive = np.arange(80) < 35
        signal = rng.normal(0, 1, 80) + 0.8 * positive
        one, two = signal + rng.normal(0, 1, 80), signal + rng.normal(0, 1, 80)
        rejected += delong(positive, one, two, label="x", confidence=0.95).p_value < 0.05
    assert 3 <= rejected <= 45


def test_delong_of_equal_models_and_of_one_label():
    positive, scores = np.arange(10) < 5, np.random.default_rng(0).random(10)
    same = delong(positive, scores, scores, label="x", confidence=0.95)
    assert (same.difference, same.p_value) == (0, 1)
    assert delong(np.ones(10, bool), scores, scores, label="x", confidence=0.95) is None


@given(st.integers(0, 30), st.integers(0, 30))
@settings(deadline=None, max_examples=60)
def test_mcnemar_is_a_fair_coins_tail_on_both_sides(b, c):
    right = np.array([True] * b + [False] * c + [True])
    other = np.array([False] * b + [True] * c + [True])
    found, n = mcnemar(right, other), b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n
    assert (found.only_this, found.only_other) == (b, c)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))


def test_calibration_is_that_of_a_slow_loop_and_of_scikit_learn():
    found = classified()
    seen = calibration_of(found.truth, found.shares, positive=1, of="b")
    error = 0.0
    for low in np.arange(10) / 10:
        inside = [i for i, p in enumerate(found.shares[:, 1]) if low <= p < low + 0.1]
        if inside:
            gap = np.mean(found.shares[inside, 1]) - np.mean(found.truth[inside] == 1)
            error += abs(gap) * len(inside) / 120
    assert seen.ece == pytest.approx(error)
    assert sum(b.records for b in seen.bins) == 120
    assert seen.log_loss == pytest.approx(log_loss(found.truth, found.shares, labels=range(3)))
    two = found.shares[:, :2] / found.shares[:, :2].sum(1, keepdims=True)
    truth = found.truth.clip(0, 1)
    brier = calibration_of(truth, two, positive=None, of="").brier
    assert brier == pytest.approx(2 * brier_score_loss(truth, two[:, 1]))


def test_a_temperature_that_was_put_on_is_found_again():
    """Labels drawn from probabilities that were made four times too sure: the temperature is 4."""
    rng = np.random.default_rng(3)
    shares = rng.dirichlet([1, 1, 1], 20_000)
    truth = (rng.random((20_000, 1)) > shares.cumsum(1)).sum(1).clip(0, 2)
    sure = tempered(shares, 1 / 4)
    assert fitted_temperature(truth, sure) == pytest.approx(4, rel=0.05)
    np.testing.assert_allclose(tempered(sure, 4), shares, atol=1e-6)


@pytest.mark.parametrize("rule", ["max-f1", "sensitivity=0.8", "specificity=0.9"])
@pytest.mark.parametrize("seed", range(3))
def test_a_threshold_is_the_best_of_all_candidates(rule, seed):
    rng = np.random.default_rng(seed)
    positive = rng.random(60) < 0.4
    scores = np.round(rng.random(60) + 0.3 * positive, 1 + seed)

    def of(threshold):
        said = scores >= threshold
        tp, fp = (said & positive).sum(), (said & ~positive).sum()
        return {
            "f1": 2 * tp / (said.sum() + positive.sum()),
            "sensitivity": tp / positive.sum(),
            "specificity": 1 - fp / (~positive).sum(),
        }

    candidates = sorted(set(scores))
    found = ThresholdRule.parse(rule).choose(positive, scores)
    if rule == "max-f1":
        assert of(found)["f1"] == pytest.approx(max(of(t)["f1"] for t in candidates))
    elif rule.startswith("sensitivity"):
        assert found == max(t for t in candidates if of(t)["sensitivity"] >= 0.8)
    else:
        assert found == min(t for t in candidates if of(t)["specificity"] >= 0.9)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=9),
    st.integers(2, 12),
)
def test_no_hidden_group_can_be_worked_out(counts, least):
    """Whoever takes the shown groups from the total is left with none, or a large sum of several."""
    sizes = {f"g{place}": pair for place, pair in enumerate(counts)}
    shown = shown_groups(sizes, least=least)
    assert all(min(sizes[group]) >= least for group in shown)
    hidden = [sizes[group] for group in sizes if group not in shown]
    if hidden and shown:
        assert len(hidden) > 1
        assert min(sum(side) for side in zip(*hidden, strict=True)) >= least
    if all(min(pair) >= least for pair in counts):
        assert not hidden
