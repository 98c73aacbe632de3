"""Promise 4: with secure aggregation the coordinator learns only sums, and can't fake a cohort.

Here it keeps everything that it receives in a round and tries. What it must not be able to do, one
attack a test; that it can't fake members is in tests/privacy/secagg/test_hostile_coordinator.py, one
refusal a test.
"""

import numpy as np
import pytest
from scipy import stats

from silotune.privacy.noise import SeededNoise
from silotune.privacy.secagg.encoding import BoundedSpan, Encoding
from silotune.privacy.secagg.keys import PRIME, Interpolation, split
from silotune.protocol.errors import MessageRefused
from silotune.protocol.requests import as_arrays
from tests.federation import PRIVATE, write_federation
from tests.privacy.secagg.secagg_world import World, vectors_for

SIZE = 200_000
SECURE = {"aggregation.secure": True, "aggregation.cohort": 3, "aggregation.threshold": 2}


@pytest.fixture(scope="module")
def spied():
    """A round of five in which one site sends a plain signal, and all the coordinator has of it."""
    code = Encoding(ring="uint32", spans=(BoundedSpan(size=SIZE - 1, bound=8.0),), cohort=5)
    planted = np.zeros(SIZE - 1)
    planted[:1000] = 4.0
    world = World(5, threshold=3)
    updates = {name: np.zeros(SIZE - 1) for name in world.names} | {world.names[0]: planted}
    vectors = {
        name: code.encode(update, SeededNoise(i))[0]
        for i, (name, update) in enumerate(updates.items())
    }
    total = world.run(vectors)
    return world, code, planted, vectors, total


def bytes_of(vector):
    return np.frombuffer(vector.tobytes(), dtype=np.uint8)


@pytest.mark.parametrize("site", range(5))
def test_a_masked_update_is_uniform_noise(spied, site):
    """Chi-square over byte values and over pairs of neighbours; false alarms 1e-7 a test."""
    world = spied[0]
    stream = bytes_of(world.wire["masked"][world.names[site]])
    assert stats.chisquare(np.bincount(stream, minlength=256)).pvalue > 1e-7
    pairs = (stream[::2] >> 4).astype(int) * 16 + (stream[1::2] >> 4)
    assert stats.chisquare(np.bincount(pairs, minlength=256)).pvalue > 1e-7


def test_an_unmasked_update_fails_the_same_test(spied):
    world, _, _, vectors, _ = spied
    stream = bytes_of(vectors[world.names[0]])
    assert stats.chisquare(np.bincount(stream, minlength=256)).pvalue < 1e-12


def correlation(code, guess, planted):
    values, _ = code.decode(guess)
    return abs(np.corrcoef(values, planted)[0, 1])


def test_all_that_was_received_does_not_give_a_planted_update(spied):
    """Every subset of masked vectors, with and without the self masks that were opened.

    An unrelated vector correlates with the signal by 1 / sqrt(SIZE) = 0.002 or so; 0.013 is passed by
    one of 62 guesses with a probability below 1e-6. The sum over everybody gives the signal away.
    """
    from itertools import combinations

    from silotune.privacy.secagg.encoding import apply_masks
    from silotune.privacy.secagg.keys import self_mask

    world, code, planted, vectors, total = spied
    assert correlation(code, vectors[world.names[0]], planted) > 0.99
    assert correlation(code, total, planted) > 0.99
    context = world.members[world.names[0]].context(1)
    seeds = {}
    points = {name: i + 1 for i, name in enumerate(world.names)}
    for name in world.names:
        shares = {points[u]: given[name] for u, given in world.wire["opened"].items()}
        seeds[name] = Interpolation([1, 2, 3]).combine(shares)
    for count in range(1, 5):
        for group in combinations(world.names, count):
            raw = sum((world.wire["masked"][name] for name in group), np.zeros(SIZE, np.uint32))
            opened = raw.copy()
            masks = [self_mask(seeds[n], context=context, site=n).inverse() for n in group]
            apply_masks(opened, masks)
            assert correlation(code, raw, planted) < 0.013
            assert correlation(code, opened, planted) < 0.013


def test_shares_below_the_threshold_fit_every_secret():
    """For any secret there is a polynomial through the same t - 1 shares: they say nothing."""
    shares = split(b"s" * 32, threshold=3, points=[1, 2, 3], key=b"k" * 32)
    for candidate in (b"a" * 32, bytes(32), b"\xff" * 32):
        wanted = int.from_bytes(candidate, "big")
        one, two = (int.from_bytes(share, "big") for share in shares[:2])
        # Lagrange through (0, wanted), (1, one), (2, two), evaluated at 3.
        third = (wanted * 1 - 3 * one + 3 * two) % PRIME
        again = {1: shares[0], 2: shares[1], 3: third.to_bytes(33, "big")}
        assert Interpolation([1, 2, 3]).combine(again) == candidate


def test_a_round_below_the_threshold_leaves_nothing_but_noise():
    from silotune.privacy.errors import TooFewSurvivors

    world = World(5, threshold=4)
    vectors = {name: np.zeros(50_000, np.uint32) for name in world.names}
    with pytest.raises(TooFewSurvivors):
        world.run(vectors, mask=world.names[:2])
    assert not world.wire["opened"]
    left = sum(world.wire["masked"].values(), np.zeros(50_000, np.uint32))
    assert stats.chisquare(np.bincount(bytes_of(left), minlength=256)).pvalue > 1e-7


def test_the_same_update_is_masked_otherwise_in_every_round():
    one, other = World(3, threshold=2), World(3, threshold=2)
    vectors = vectors_for(one.names, 100)
    one.run(vectors)
    other.run(vectors)
    for name in one.names:
        assert (one.wire["masked"][name] != other.wire["masked"][name]).mean() > 0.9


# --- through the site's own front door ------------------------------------------------------------


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("promise4"), bert_folder)


def test_a_site_does_not_send_a_bare_update_under_a_secure_plan(federation):
    plan = federation.plan.override({**PRIVATE, **SECURE, "privacy.noise": "shared"})
    part = federation.runs(plan, state="bare")[0]
    adapter = as_arrays(np.zeros(4, np.float32))["flat"].numpy()
    with pytest.raises(MessageRefused, match="masked"):
        part.train(adapter, 1)
    assert part.ledger.rows() == []


def test_a_site_does_not_take_part_in_secure_rounds_of_a_plain_plan(federation):
    part = federation.runs(state="plain")[0]
    with pytest.raises(MessageRefused, match="bare"):
        part.in_secure(1)


def test_a_site_without_a_roster_joins_no_secure_run(federation):
    from silotune.privacy.errors import SignerUnknown

    part = federation.runs(federation.plan.override({**PRIVATE, **SECURE}), state="roster")[0]
    with pytest.raises(SignerUnknown, match="not enrolled"):
        part.join()
