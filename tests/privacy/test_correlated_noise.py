"""Correlated noise against dense matrices, densities of whole runs, and samples of them."""

import itertools
import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import norm

from silotune.client.terms import round_event, run_events, sigma_for
from silotune.errors import SelfCheckFailed
from silotune.privacy.accounting import epsilon
from silotune.privacy.bands import correlated
from silotune.privacy.noise import DRAW_STD, SeededNoise, noised
from tests.plan.test_bands import plan_with, toeplitz

weights = st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=5).map(lambda free: [1.0, *free])


def rows_of(column, taking_part, *, seed, size=40, std=2.0):
    """Noise of each round that a site takes part in, made row after row as a site makes it."""
    made = {}
    for number in taking_part:
        sums = np.random.default_rng(number).normal(size=size)
        earlier = {number - n: row for n, row in made.items() if number - n < len(column)}
        sent, own = correlated(
            sums,
            earlier,
            column=column,
            stds=[std],
            sizes=[size],
            noise=SeededNoise(seed + number),
        )
        assert sent.dtype == np.float32
        noise = own * (std / DRAW_STD)
        np.testing.assert_allclose(sent - sums, noise, rtol=1e-5, atol=1e-5 * std)
        made[number] = own
    return {number: row * (std / DRAW_STD) for number, row in made.items()}


@settings(max_examples=30, deadline=None)
@given(column=weights, taking_part=st.sets(st.integers(1, 12), min_size=1).map(sorted))
def test_rows_are_the_inverse_of_c_times_fresh_noise(column, taking_part):
    made = rows_of(column, taking_part, seed=7)
    fresh = np.array(
        [noised(np.zeros(40), [2.0], [40], noise=SeededNoise(7 + n)) for n in taking_part]
    )
    places = np.array(taking_part) - 1
    matrix = toeplitz(column, 12)[np.ix_(places, places)]
    found = np.array([made[n] for n in taking_part])
    scale = np.abs(np.linalg.inv(matrix)).max()
    np.testing.assert_allclose(matrix @ found, fresh, rtol=1e-5, atol=1e-5 * scale)


@settings(max_examples=200, deadline=None)
@given(column=weights, taking_part=st.sets(st.integers(0, 19)).map(sorted))
def test_a_unit_moves_no_more_than_the_column_norm_and_its_rounds_move_different_rows(
    column, taking_part
):
    """Also where a site misses any of the rounds."""
    bands, rounds = len(column), 20
    matrix = toeplitz(column, rounds)[np.ix_(taking_part, taking_part)]
    for place, number in enumerate(taking_part):
        assert np.linalg.norm(matrix[:, place]) <= np.linalg.norm(column) * (1 + 1e-12)
        for other, later in enumerate(taking_part):
            if later - number >= bands:
                assert not (matrix[:, place] * matrix[:, other]).any()


def test_noise_of_another_shape_or_without_an_end_is_not_taken_back():
    for row in (np.zeros(3), np.full(2, np.inf), np.zeros(2, dtype=np.float32)):
        with pytest.raises(SelfCheckFailed):
            correlated(
                np.zeros(2),
                {1: row},
                column=(1.0, 0.5),
                stds=[1.0],
                sizes=[2],
                noise=SeededNoise(1),
            )


class Released:
    """A unit's run, one number a round: its gradient depends on what was released before."""

    def __init__(self, *, column=(1.0, 0.8, -0.5), rounds=8, first=1, rate=0.6, sigma=0.9):
        self.column, self.rounds, self.rate = np.array(column), rounds, rate
        self.std = sigma * np.linalg.norm(column)
        self.turns = range(first, rounds, len(column))
        self.matrix = toeplitz(column, rounds)

    @staticmethod
    def gradient(before):
        """As long as clipping allows, and to the side that earlier rounds say."""
        return math.copysign(1.0, math.sin(3.0 * sum(before) + 0.5))

    def sums(self, released, drawn):
        """What the unit adds in each round, if it is drawn in these."""
        return np.array(
            [self.gradient(released[:n]) if n in drawn else 0.0 for n in range(self.rounds)]
        )

    def density(self, released, drawn):
        """Log of the density of C X around C G: the whole run at once, as one normal vector."""
        centre = self.matrix @ self.sums(released, drawn)
        return norm.logpdf(self.matrix @ np.array(released), centre, self.std).sum()

    def mixed(self, released):
        """Over every set of rounds that the unit may have been drawn in."""
        found = []
        for count in range(len(self.turns) + 1):
            for drawn in itertools.combinations(self.turns, count):
                chance = self.rate**count * (1 - self.rate) ** (len(self.turns) - count)
                found.append(math.log(chance) + self.density(released, drawn))
        return logsumexp(found)

    def losses(self, released):
        """Of the composition of one subsampled Gaussian a block, from its own rows alone."""
        white = self.matrix @ np.array(released)
        found = 0.0
        for turn in self.turns:
            rows = white[turn : turn + len(self.column)]
            column = self.column[: len(rows)]
            moved = self.gradient(released[:turn]) * column
            ratio = (moved @ rows - moved @ moved / 2) / self.std**2
            found += math.log1p(self.rate * math.expm1(ratio))
        return found

    def sample(self, rng, *, with_unit):
        released, noise = [], []
        fresh = rng.normal(scale=self.std, size=self.rounds)
        coins = rng.random(self.rounds) < self.rate
        for number in range(self.rounds):
            past = noise[::-1][: len(self.column) - 1]
            noise.append(fresh[number] - sum(c * z for c, z in zip(self.column[1:], past)))  # noqa: B905
            takes_part = with_unit and number in self.turns and coins[number]
            released.append(noise[-1] + (self.gradient(released) if takes_part else 0.0))
        return released


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_run_loses_exactly_what_one_subsampled_gaussian_a_block_loses(first):
    """To the last digits, for releases that depend on each other: the proof's central step."""
    run, rng = Released(first=first), np.random.default_rng(first)
    for with_unit in (True, False):
        for _ in range(20):
            released = run.sample(rng, with_unit=with_unit)
            loss = run.mixed(released) - run.density(released, ())
            assert loss == pytest.approx(run.losses(released), abs=1e-9)


def test_what_sampled_runs_give_away_stays_within_the_accountants_delta():
    """20,000 runs each way; each of six comparisons fails with a chance of at most 1e-9."""
    run, rng = Released(sigma=1.2), np.random.default_rng(5)
    event = SelfComposedDpEvent(
        PoissonSampledDpEvent(run.rate, GaussianDpEvent(1.2)), len(run.turns)
    )
    accountant = PLDAccountant().compose(event)
    there, gone = (
        np.array([run.losses(run.sample(rng, with_unit=side)) for _ in range(20_000)])
        for side in (True, False)
    )
    tight = 0
    for level in (0.5, 1.0, 2.0):
        bound = accountant.get_delta(level)
        for losses in (there, -gone):
            lost = np.maximum(0.0, -np.expm1(level - losses))
            slack = math.sqrt(math.log(1e9) / (2 * len(lost)))  # Hoeffding: values in [0, 1]
            assert lost.mean() <= bound + slack
            tight += lost.mean() > bound / 2
    assert tight, "the samples say nothing: the bound is far from all of them"


@pytest.mark.parametrize("bands", [2, 3, 8])
def test_the_noise_of_a_plan_is_the_least_for_one_sampled_gaussian_a_block(bands):
    plan = plan_with(**{"privacy.bands": bands})
    sigma = sigma_for(plan, 1000)
    count, rate = math.ceil(72 / bands), bands * 0.06
    own = PoissonSampledDpEvent(rate, GaussianDpEvent(sigma))
    theirs = PLDAccountant().compose(SelfComposedDpEvent(own, count)).get_epsilon(1e-5)
    (whole,) = run_events(plan, 1000, sigma=sigma)
    ours = epsilon([whole], delta=1e-5)
    assert 7.98 < ours <= 8.0
    assert ours == pytest.approx(theirs, rel=1e-3)
    block = round_event(plan, 1000, sigma=sigma)
    assert whole.count == count * block.count
    assert block.event == whole.event


def test_weights_change_nothing_that_is_charged():
    plan = plan_with(**{"privacy.band_weights": [1.0, 0.9, 0.8]})
    other = plan_with(**{"privacy.band_weights": [1.0, -0.3]})
    assert sigma_for(plan, 1000) == sigma_for(other, 1000)
    assert run_events(plan, 1000, sigma=1.0) == run_events(other, 1000, sigma=1.0)


def test_a_small_site_samples_no_more_than_everybody_whose_turn_it_is():
    plan = plan_with(**{"privacy.rate": None, "privacy.batch": 500})
    assert plan.draw_rate(1000) == 1.0
    assert plan.rate_for(1000) == pytest.approx(1 / 8)
    assert plan.expected_batch(1000) == pytest.approx(700 / 8)
