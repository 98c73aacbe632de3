"""Correlated noise in shares: what a coordinator that chooses who is in which sum can make of it.

It may leave out whoever it likes, whenever it likes, and have them back. docs/privacy.md has the proof
that is tested here, on the rows that the sites' own code makes, by exact linear algebra; and once with
noise, through the ring.
"""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import norm

from silotune.errors import SelfCheckFailed
from silotune.privacy.bands import taken_back
from silotune.privacy.events import step_event, to_json
from silotune.privacy.noise import SeededNoise
from silotune.privacy.secagg.encoding import BoundedSpan, Encoding
from silotune.privacy.tally import epsilon_at_two_sites, epsilon_of, epsilon_of_two_units

_UNIT = 1 << 36  # a unit of fresh noise: large, so that rounding to whole numbers is not seen
_ROOT = (1.0, 0.5, 0.375, 0.3125)  # best where rounds are just added up
_ROUNDS = 8


def ago(rows, now):
    """Rows by how many rounds ago."""
    return {now - number: row for number, row in rows.items()}


def rows_of(masked, weights, *, by_round, fresh, forgets=lambda number: ()):
    """A site's row of every round in which it drew one; `fresh` gives its new noise."""
    rows, found = {}, {}
    for place, number in enumerate(sorted(masked)):
        key = number if by_round else place
        for old in forgets(number):
            rows.pop(old, None)
        new = fresh(number)
        rows[key] = new - taken_back(ago(rows, key), column=weights, size=len(new))
        found[number] = rows[key]
    return found


def stream(masked, weights, *, by_round=True, **how):
    """What a unit of a site's fresh noise of each round does to all its rows: one column each.

    `masked` are the rounds in which it draws a row. One that counts by its own rounds instead of the
    run's, as a careless site would, takes back from the row that it drew last, whenever that was.
    """
    columns = np.zeros((_ROUNDS, _ROUNDS))
    for of in masked:
        unit = rows_of(
            masked,
            weights,
            by_round=by_round,
            fresh=lambda number, of=of: np.array([_UNIT * (number == of)]),
            **how,
        )
        for number, row in unit.items():
            columns[number, of] = row[0] / _UNIT
    return columns


def covariance(opened, masked, weights, *, threshold, **how):
    """Of the noise in the opened sums, over sigma^2: every share has 1 / threshold of it.

    `opened` and `masked` say for each round which sites are in the sum, and which drew a row for it.
    """
    found = np.zeros((_ROUNDS, _ROUNDS))
    for site in set().union(*masked):
        mine = [t for t in range(_ROUNDS) if site in masked[t]]
        seen = np.diag([float(site in names) for names in opened])
        part = seen @ stream(mine, weights, **how)
        found += part @ part.T
    return found * (np.dot(weights, weights) / threshold)


def promised(opened, weights, *, threshold):
    """The proof's bound on the inverse: rounds that are `bands` apart have nothing in common."""
    found = np.zeros((_ROUNDS, _ROUNDS))
    for s, t in itertools.product(range(_ROUNDS), repeat=2):
        lag, common = abs(s - t), len(opened[s] & opened[t])
        if lag < len(weights):
            overlap = np.dot(weights[: len(weights) - lag], weights[lag:])
            found[s, t] = overlap * common / (len(opened[s]) * len(opened[t]))
    return found * threshold / np.dot(weights, weights)


def exposure(noise, bands):
    """What the most exposed unit's draws come to, over what the ledger counts for so many.

    A unit is drawn in rounds of one of `bands` groups. The ledger counts 1 / sigma^2 for each.
    """
    worst = 0.0
    for group in range(bands):
        mine = range(group, _ROUNDS, bands)
        for size in range(1, len(mine) + 1):
            for drawn in itertools.combinations(mine, size):
                moved = np.zeros(_ROUNDS)
                moved[list(drawn)] = 1.0
                worst = max(worst, moved @ np.linalg.solve(noise, moved) / size)
    return worst


def attendance(rng, *, sites, least):
    """Random sums of at least so many sites; some sent a masked update that was left out of the sum."""
    opened = [
        set(rng.permutation(sites)[: rng.integers(least, sites + 1)].tolist())
        for _ in range(_ROUNDS)
    ]
    masked = [names | {site for site in range(sites) if rng.random() < 0.3} for names in opened]
    return opened, masked


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_whoever_is_left_out_and_comes_back_no_unit_is_exposed_more_than_is_charged(bands):
    weights, rng = _ROOT[:bands], np.random.default_rng(bands)
    for _ in range(25):
        threshold = int(rng.integers(1, 5))
        opened, masked = attendance(rng, sites=6, least=threshold)
        noise = covariance(opened, masked, weights, threshold=threshold)
        bound = promised(opened, weights, threshold=threshold)
        assert np.linalg.eigvalsh(bound - np.linalg.inv(noise)).min() > -1e-9
        assert np.diag(bound).max() <= 1.0 + 1e-12
        assert exposure(noise, bands) <= 1.0 + 1e-9


def test_a_site_that_lost_some_of_its_rows_exposes_nobody():
    rng = np.random.default_rng(5)
    for _ in range(25):
        opened, masked = attendance(rng, sites=5, least=3)
        lost = {t: rng.permutation(_ROUNDS)[: rng.integers(0, 4)].tolist() for t in range(_ROUNDS)}
        noise = covariance(opened, masked, _ROOT, threshold=3, forgets=lost.__getitem__)
        assert exposure(noise, 4) <= 1.0 + 1e-9


@pytest.mark.parametrize("colluding", [1, 2])
def test_of_sites_that_collude_only_the_shares_are_gone(colluding):
    """A ledger's row for c of them: sigma sqrt((T - c) / T). Here T = 3, and c = 1 or 2 in each sum."""
    rng = np.random.default_rng(colluding)
    for _ in range(25):
        opened, masked = attendance(rng, sites=6, least=3 - colluding)
        noise = covariance(opened, masked, _ROOT, threshold=3)
        assert exposure(noise, 4) <= 3 / (3 - colluding) + 1e-9


def climbed(by_round, *, sites=4, threshold=2, bands=2):
    """The coordinator's best choice of sums, by changing one site of one sum at a time."""
    rng, weights = np.random.default_rng(7), _ROOT[:bands]

    def worth(opened):
        noise = covariance(opened, opened, weights, threshold=threshold, by_round=by_round)
        return exposure(noise, bands)

    opened = [set(rng.permutation(sites)[:threshold].tolist()) for _ in range(_ROUNDS)]
    best, better = worth(opened), True
    while better:
        better = False
        for t, site in itertools.product(range(_ROUNDS), range(sites)):
            tried = [names ^ {site} if s == t else names for s, names in enumerate(opened)]
            if len(tried[t]) >= threshold and (found := worth(tried)) > best + 1e-12:
                opened, best, better = tried, found, True
    return best


def test_a_coordinator_that_searches_for_its_best_drops_gains_nothing():
    assert climbed(by_round=True) <= 1.0 + 1e-9


def test_it_would_win_against_sites_that_count_rows_by_their_own_rounds():
    """The attack that this module would notice: two groups by turns bring distant draws together."""
    assert climbed(by_round=False) > 1.3


def test_noise_need_not_be_that_of_sites_that_stay_throughout():
    """With sites that come back it may lie below T K in some direction; in none that a unit can move."""
    groups = [{0, 1}, {1, 2}, {2, 0}]
    opened = [groups[t % 3] for t in range(_ROUNDS)]
    noise = covariance(opened, opened, _ROOT, threshold=2)
    stays = covariance([{0, 1}] * _ROUNDS, [{0, 1}] * _ROUNDS, _ROOT, threshold=2)
    assert np.linalg.eigvalsh(noise - stays).min() < -0.05
    assert exposure(noise, 4) <= 1.0 + 1e-9


# --- with noise, through the ring ----------------------------------------------------------------------

_TRIALS = 20_000
_SIGMA = 1.0


def sums_seen(opened, weights, *, threshold, by_round, moved):
    """What a coordinator that leaves sites out sees of numbers that are 0 but for a unit's draws."""
    code = Encoding(ring="uint32", spans=(BoundedSpan(size=_TRIALS, bound=1024.0),), cohort=8)
    std = _SIGMA * math.sqrt(np.dot(weights, weights) / threshold)
    rows, seen = {}, np.zeros((_ROUNDS, _TRIALS))
    for number, names in enumerate(opened):
        total = code.zeros()
        for site in sorted(names):
            mine = rows.setdefault(site, {})
            key = number if by_round else len(mine)
            sent = np.full(_TRIALS, moved[number] if site == min(names) else 0.0)
            ring, _, mine[key] = code.encode_with_row(
                sent,
                [std],
                SeededNoise(1000 * number + site),
                back=taken_back(ago(mine, key), column=weights, size=_TRIALS),
                growth=2.0,
            )
            total += ring
        seen[number] = code.decode(total)[0]
    return seen


def power(by_round):
    """Chance of telling a drawn unit from one that is not, at 5 % false alarms; and what is charged for.

    Each of 20,000 numbers is a trial of its own. The coordinator knows the covariance.
    """
    weights, threshold = _ROOT[:3], 2
    groups = [{0, 1}, {2, 3}, {4, 5}]
    opened = [groups[t % 3] for t in range(_ROUNDS)]
    moved = np.array([float(t % 3 == 0) for t in range(_ROUNDS)])
    noise = _SIGMA**2 * covariance(opened, opened, weights, threshold=threshold, by_round=by_round)
    direction = np.linalg.solve(noise, moved)
    seen = sums_seen(opened, weights, threshold=threshold, by_round=by_round, moved=moved)
    score = direction @ seen / math.sqrt(direction @ moved)  # of standard deviation 1
    charged = math.sqrt(moved @ moved) / _SIGMA
    return float(np.mean(score > norm.isf(0.05))), float(norm.sf(norm.isf(0.05) - charged))


def test_an_attack_on_the_sums_has_at_most_the_power_that_is_charged():
    """False alarms: 5 standard deviations of 20,000 trials, below 1e-6."""
    found, charged = power(by_round=True)
    assert found <= charged + 5 * 0.5 / math.sqrt(_TRIALS)


def test_the_same_attack_has_more_against_sites_that_count_by_their_own_rounds():
    found, charged = power(by_round=False)
    assert found > charged + 5 * 0.5 / math.sqrt(_TRIALS)


def test_the_noise_of_the_sums_is_what_the_proof_says_also_between_rounds():
    """Sample covariances of 20,000 numbers, each within 5.5 standard deviations: below 3e-6 in all."""
    weights, threshold = _ROOT, 2
    groups = [{0, 1, 2}, {1, 2}, {2, 3}, {0, 3}]
    opened = [groups[t % 4] for t in range(_ROUNDS)]
    seen = sums_seen(opened, weights, threshold=threshold, by_round=True, moved=np.zeros(_ROUNDS))
    theory = _SIGMA**2 * covariance(opened, opened, weights, threshold=threshold)
    sizes = np.sqrt(np.outer(np.diag(theory), np.diag(theory)) + theory**2)
    assert np.abs(seen @ seen.T / _TRIALS - theory).max() < 5.5 * sizes.max() / math.sqrt(_TRIALS)
    assert np.abs((seen @ seen.T / _TRIALS - theory) / sizes).max() < 5.5 / math.sqrt(_TRIALS)


@pytest.mark.parametrize("wrong", [np.zeros(5, np.int64), np.zeros(4)], ids=["size", "type"])
def test_a_row_of_another_shape_or_type_is_refused(wrong):
    with pytest.raises(SelfCheckFailed):
        taken_back({1: wrong}, column=_ROOT, size=4)


def test_fresh_noise_left_out_of_a_row_is_noticed():
    class Silent(SeededNoise):
        def draws(self, n):
            for start, drawn in super().draws(n):
                yield start, drawn * 0

    code = Encoding(ring="uint32", spans=(BoundedSpan(size=1000, bound=1024.0),), cohort=8)
    with pytest.raises(SelfCheckFailed, match="not what was asked"):
        code.encode_with_row(
            np.zeros(1000), [1.0], Silent(0), back=np.full(1000, 1 << 42), growth=2.0
        )


def test_two_units_at_once_are_charged_by_way_of_the_data_with_one_of_them():
    """Two releases that are (e, d) each are (2 e, (1 + exp(e)) d) together."""
    delta, tally = 1e-5, {to_json(step_event(rate=0.48, sigma=1.6, steps=1)): 9}
    found = epsilon_of_two_units(tally, delta=delta)
    one = found / 2
    assert epsilon_of(tally, delta=delta / (1 + math.exp(one))) <= one
    # No less than a bound that holds for noise of one round each; and no more than it must be.
    assert found >= epsilon_at_two_sites(tally, delta=delta)
    assert epsilon_of(tally, delta=delta / (1 + math.exp(0.99 * one))) > 0.99 * one
