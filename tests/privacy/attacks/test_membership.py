"""How well scores separate, and what a model remembers of secrets."""

import numpy as np
import pytest

from silotune.models.spans import spans_in
from silotune.privacy.attacks.canaries import exposures, memorisation, plant, separation


def test_separate_scores_are_told_apart_and_equal_ones_are_not():
    coins = np.array([True, False] * 100)
    apart = separation(coins.astype(float), coins)
    assert (apart.auc, apart.hits) == (1.0, 1.0)
    level = separation(np.zeros(200), coins)
    assert (level.auc, level.hits) == (0.5, 0.0)
    reverse = separation(-coins.astype(float), coins)
    assert (reverse.auc, reverse.hits) == (0.0, 0.0)


def test_hits_are_counted_at_one_false_alarm_in_a_hundred():
    outside = np.arange(200.0)
    inside = np.array([196.5, 197.5, 198.5, 250.0])  # two of 200 may be above the threshold: 197
    scores = np.concatenate([outside, inside])
    coins = np.arange(len(scores)) >= 200
    assert separation(scores, coins).hits == 0.75


def test_canaries_are_needed_on_both_sides():
    with pytest.raises(ValueError, match="both sides"):
        separation(np.zeros(3), np.ones(3, dtype=bool))


def test_exposure_is_the_rank_in_bits():
    others = np.tile(np.arange(1.0, 256.0), (3, 1))
    bits = exposures(np.array([0.0, 1.5, 300.0]), others)
    assert bits == pytest.approx([8.0, 7.0, 0.0])


def test_a_secret_before_all_candidates_has_the_bits_of_its_distance():
    others = np.random.default_rng(2).normal(size=(1, 255))
    others = (others - others.mean()) / others.std()
    # -log2 of the normal distribution's tail: 2.9e-7 at five standard deviations.
    assert exposures(np.array([-5.0]), others) == pytest.approx([21.7], abs=0.1)
    assert exposures(np.array([0.5]), np.ones((1, 255))) > 8


def test_an_unseen_secret_has_one_and_a_half_bits_in_the_mean():
    rng = np.random.default_rng(1)
    bits = exposures(rng.normal(size=4000), rng.normal(size=(4000, 255)))
    # The spread of an exposure is below 1.5 bits: off by 0.12 with a probability below 1e-6.
    assert bits.mean() == pytest.approx(1 / np.log(2), abs=0.12)


def test_secrets_that_were_trained_on_are_counted_apart():
    seen = memorisation(
        np.array([8.0, 2.0, 1.0]),
        np.array([True, False, True]),
        np.array([True, True, False]),
        among=256,
    )
    assert (seen.exposure, seen.exposure_unseen, seen.largest) == (5.0, 1.0, 8.0)
    assert (seen.extracted, seen.secrets, seen.extracted_unseen) == (1, 2, 1)


def test_canaries_are_alike_for_a_seed_and_nobodys_without():
    for labels in (("a", "b"), ()):
        one, again = (plant(50, labels=labels, seed=3) for _ in range(2))
        assert one.examples == again.examples
        assert np.array_equal(one.coins, again.coins)
        secret = plant(50, labels=labels, seed=None)
        assert secret.examples != plant(50, labels=labels, seed=None).examples
        assert len({next(iter(example.values())) for example in one.examples}) == 50


def test_a_canary_of_spans_has_its_first_word_marked():
    for example in plant(20, labels=("a", "b"), seed=3, target="spans").examples:
        (span,) = spans_in(example["spans"])
        assert example["text"][: span.end] == example["text"].split()[0]
        assert (span.start, span.label in {"a", "b"}) == (0, True)
