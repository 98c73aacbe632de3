import copy
import hashlib
import math
import os
import pickle
import struct
import threading
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from silotune.privacy import noise
from silotune.privacy.noise import NoiseSource, SecureNoise, SeededNoise, derive_seed

GRID = noise._GRID_PER_STD  # of noise with standard deviation 1

# Every statistical test below rejects with probability 1e-7 if the claim is true, and fewer than ten
# of them are random: the false alarms of a whole run are below 1e-6.
ALARM = 1e-7
LIMIT = stats.norm.isf(ALARM / 2)


def normal(source, shape, std):
    return source.add(torch.zeros(shape), std)


@pytest.fixture(scope="module")
def draws():
    return normal(SecureNoise(), (1 << 20,), 1.0).double().numpy()


def test_noise_follows_the_normal_distribution(draws):
    assert stats.kstest(draws, "norm").pvalue > ALARM


def test_noise_has_mean_zero_and_the_asked_variance(draws):
    n = len(draws)
    assert abs(draws.mean()) * math.sqrt(n) < LIMIT
    assert abs(np.square(draws).mean() - 1) * math.sqrt(n / 2) < LIMIT


def test_noise_has_the_skewness_and_kurtosis_of_a_normal(draws):
    n = len(draws)
    assert abs((draws**3).mean()) * math.sqrt(n / 15) < LIMIT
    assert abs((draws**4).mean() - 3) * math.sqrt(n / 96) < LIMIT


@pytest.mark.parametrize("bound", [3.0, 4.0])
def test_noise_has_the_tails_of_a_normal(draws, bound):
    beyond = int((np.abs(draws) > bound).sum())
    share = 2 * stats.norm.sf(bound)
    assert stats.binomtest(beyond, len(draws), share).pvalue > ALARM


def test_draws_near_each_other_are_not_correlated(draws):
    # Ljung-Box over lags that include those of a block and of a cipher block.
    n, total = len(draws), 0.0
    lags = [1, 2, 3, 4, 8, 16, noise._BLOCK]
    for lag in lags:
        total += n * float(np.dot(draws[lag:], draws[:-lag]) / n) ** 2
    assert stats.chi2.sf(total, len(lags)) > ALARM


def test_uniform_numbers_are_uniform():
    assert stats.kstest(SecureNoise().uniform(1 << 18), "uniform").pvalue > ALARM


def test_uniform_numbers_are_53_bit_fractions_below_one():
    drawn = SeededNoise(1).uniform(1000)
    assert drawn.dtype == np.float64
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert (drawn * 2.0**53 == np.floor(drawn * 2.0**53)).all()
    assert SeededNoise(1).uniform(0).shape == (0,)


# --- the sampler, exactly -----------------------------------------------------------------------


def test_weights_are_those_of_a_discrete_gaussian():
    weights = noise.coarse_weights()
    assert sum(weights) == 2**96
    assert weights[0] == 0 and weights[1:8192] == weights[:8192:-1]
    with mpmath.workdps(50):
        total = mpmath.fsum(mpmath.exp(-(k**2) / mpmath.mpf(1280000)) for k in range(-8191, 8192))
        for k in (1, 2, 77, 800, 4321, 7000, 8191):
            share = mpmath.exp(-(k**2) / mpmath.mpf(1280000)) / total
            assert abs(weights[8192 + k] - share * 2**96) <= 1
        assert abs(weights[8192] - 2**96 / total) < 2**15


def test_alias_table_gives_every_value_exactly_its_weight():
    entries, rests = noise.alias_table()
    rebuilt = [0] * 2**14
    for column, (entry, rest) in enumerate(zip(entries.tolist(), rests, strict=True)):
        threshold = ((entry >> 14) << 64) + rest
        rebuilt[column] += threshold
        rebuilt[entry % 2**14] += 2**82 - threshold
    assert rebuilt == noise.coarse_weights()


@pytest.mark.parametrize("column", [0, 1, 5000, 8192, 9999, 16383])
@pytest.mark.parametrize("extra", [0, 2**64 - 1])
def test_a_column_is_kept_for_exactly_its_share_of_coins(column, extra):
    entries, rests = noise.alias_table()
    first, alias = int(entries[column]) >> 14, int(entries[column]) % 2**14
    coins = np.arange(2**18, dtype=np.uint32)
    found = np.empty(2**18, dtype=np.uint32)
    asked = []

    def lazy():
        asked.append(1)
        return extra

    words = (np.uint32(column) << np.uint32(18)) | coins
    noise._Lookup(2**18).columns(words, lazy, out=found)
    tied = column if extra < rests[column] else alias
    expected = np.where(coins < first, column, np.where(coins > first, alias, tied))
    assert (found == expected).all()
    assert len(asked) == 1  # one coin in 2**18 is looked at more closely


def test_density_is_that_of_a_gaussian_plus_uniforms_up_to_the_stated_ripple():
    weights = noise.coarse_weights()

    def spline(t):  # density of the sum of three uniforms on (-1/2, 1/2)
        t = abs(t)
        if t < 0.5:
            return mpmath.mpf(3) / 4 - t * t
        return (mpmath.mpf(3) / 2 - t) ** 2 / 2 if t < 1.5 else mpmath.mpf(0)

    def ideal(y):
        def integrand(t):
            return mpmath.npdf(y - t, 0, 800) * spline(t)

        return mpmath.quad(integrand, [-1.5, -0.5, 0.5, 1.5])

    with mpmath.workdps(40):
        for z, part in [(0, 0.3), (0.5, 0.2), (1, 0.6), (3, 0.1), (6, 0.25), (8, 0.8)]:
            y = mpmath.mpf(round(800 * z)) + mpmath.mpf(part)
            near = range(int(y) - 2, int(y) + 4)
            actual = sum(weights[8192 + k] * spline(y - k) for k in near) / mpmath.mpf(2) ** 96
            bound = 2.001 * (2 * math.pi * 800) ** -3 * abs(z**3 - 3 * z) + 1e-13
            assert abs(actual / ideal(y) - 1) < bound


def test_the_keystream_is_aes_256_in_counter_mode_and_starts_with_the_next_key():
    source = SeededNoise(7)
    key = source._key
    words = next(source._keystream(6, 1)).copy()
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    stream = block.update(b"".join(i.to_bytes(16, "big") for i in range(5)))
    assert source._key == stream[:32]
    assert words.tobytes() == stream[32:80]


# --- floating point does not leak ---------------------------------------------------------------


@given(st.floats(-1e4, 1e4, width=32), st.integers(0, 1000))
def test_noise_is_added_to_the_rounded_sum_without_error(value, seed):
    (_, drawn), *_ = SeededNoise(seed).draws(1)
    steps = round(Fraction(value) / Fraction(GRID))
    exact = (steps + int(drawn[0])) * Fraction(GRID)
    released = SeededNoise(seed).add(torch.tensor([value]), 1.0)
    # Two roundings, to float64 and to float32, of one exact number.
    assert abs(Fraction(released.item()) - exact) <= abs(exact) * Fraction(2) ** -23
    if abs(steps) < 2**50:
        assert released.item() == float(np.float32(float(steps + int(drawn[0])) * GRID))


@given(st.integers(0, 1000), st.integers(-(2**40), 2**40), st.floats(-0.49, 0.49))
def test_bits_of_a_sum_below_the_grid_never_reach_the_output(seed, steps, part):
    on_grid = torch.tensor([steps * GRID], dtype=torch.float64)
    beside = torch.tensor([(steps + part) * GRID], dtype=torch.float64)
    assert SeededNoise(seed).add(on_grid, 1.0) == SeededNoise(seed).add(beside, 1.0)


def test_every_grid_point_is_reachable_from_every_other():
    # Low halves of draws are uniform, so no value is a multiple of anything coarser than the grid.
    (_, drawn), *_ = SeededNoise(5).draws(4096)
    for bits in (1, 8, 16):
        counts = np.bincount((drawn & ((1 << bits) - 1)) >> max(0, bits - 3), minlength=8)
        counts = counts[counts > 0]
        assert len(counts) == min(8, 2**bits)
        assert stats.chisquare(counts).pvalue > ALARM  # seeded: either always or never


def test_rounding_is_paid_for_by_the_inflation_of_the_noise():
    # sigma sqrt(D) grid <= (inflation - 1) clip, in units of the noise's standard deviation
    sigma, size = 2000.0, 10**6
    assert sigma * math.sqrt(size) * GRID < noise.INFLATION - 1


# --- use ----------------------------------------------------------------------------------------


def test_sums_keep_shape_and_are_left_alone():
    sums = torch.randn(3, 1, 5)[:, :, ::2]
    before = sums.clone()
    released = SecureNoise().add(sums, 0.5)
    assert released.shape == sums.shape and released.dtype == torch.float32
    assert torch.equal(sums, before) and not torch.equal(released, sums)
    assert SecureNoise().add(torch.zeros(0, 4), 1.0).shape == (0, 4)
    assert normal(SecureNoise(), (2, 3), 1.0).shape == (2, 3)


def test_noise_scales_with_its_standard_deviation_and_not_with_the_sum():
    small = normal(SeededNoise(1), (1000,), 1e-3)
    large = normal(SeededNoise(1), (1000,), 1e3)
    assert torch.allclose(small * 1e6, large, rtol=1e-6)
    shifted = SeededNoise(1).add(torch.full((1000,), 4.0), 1e-3)
    assert torch.allclose(shifted - 4.0, small, atol=1e-6)


def test_nan_and_infinity_stay_visible():
    released = SecureNoise().add(torch.tensor([math.nan, math.inf, -math.inf, 1.0]), 1.0)
    assert released[0].isnan()
    assert released[1] == math.inf and released[2] == -math.inf and released[3].isfinite()


def test_no_noise_gives_a_copy():
    sums = torch.randn(4)
    released = SecureNoise().add(sums, 0.0)
    assert torch.equal(released, sums) and released.data_ptr() != sums.data_ptr()


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, 1e-40])
def test_an_impossible_standard_deviation_is_refused(std):
    with pytest.raises(ValueError, match="standard deviation"):
        SecureNoise().add(torch.zeros(2), std)


def test_half_precision_sums_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        SecureNoise().add(torch.zeros(2, dtype=torch.bfloat16), 1.0)


# --- streams ------------------------------------------------------------------------------------


def test_secure_noise_never_repeats():
    source = SecureNoise()
    a, b, c = normal(source, (8,), 1.0), normal(source, (8,), 1.0), normal(SecureNoise(), (8,), 1.0)
    assert not torch.equal(a, b) and not torch.equal(a, c)
    assert source.secure and isinstance(source, NoiseSource)


def test_no_key_is_used_twice_by_threads():
    source, found = SecureNoise(), []

    def draw():
        for _ in range(200):
            found.append(source.uniform(2).tobytes())

    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1600


def test_a_forked_process_does_not_share_its_parents_noise():
    source = SecureNoise()
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(theirs, source.uniform(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(ours, 32) != source.uniform(4).tobytes()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_source_can_not_be_duplicated(duplicate):
    for source in (SecureNoise(), SeededNoise(1)):
        with pytest.raises(TypeError, match="must not be repeated"):
            duplicate(source)


def digest(source):
    state = hashlib.sha256(normal(source, (40000,), 1.5).numpy().tobytes())
    state.update(source.uniform(3).tobytes())
    return state.hexdigest()


def test_a_seed_gives_the_same_noise_in_every_process_and_version():
    # Printed by another process; and the stream is integers, so machines don't matter either.
    golden = "ce19a4e14e715df8e1b0bb6ddea0cc6f2e8cbef713fc032d36b16ed9ac3619de"
    torch.manual_seed(1)
    np.random.seed(1)
    assert digest(SeededNoise(42)) == golden
    assert not SeededNoise(42).secure and isinstance(SeededNoise(42), NoiseSource)


def test_seeded_noise_passes_the_same_test_of_normality():
    drawn = normal(SeededNoise(3), (1 << 18,), 2.0).double().numpy()
    assert stats.kstest(drawn / 2.0, "norm").pvalue > ALARM  # seeded: either always or never


def test_different_seeds_give_different_noise():
    seeds = [1, 2, -1, b"1", b"", b"i1", derive_seed(1), derive_seed(1, "a")]
    assert len({SeededNoise(seed).uniform(2).tobytes() for seed in seeds}) == len(seeds)


LABELS = st.lists(st.one_of(st.text(max_size=4), st.integers(-300, 300)), max_size=4)


@given(st.tuples(st.integers(), LABELS), st.tuples(st.integers(), LABELS))
def test_seeds_differ_as_soon_as_a_label_does(one, other):
    typed = [(case[0], [(type(x), x) for x in case[1]]) for case in (one, other)]
    same = derive_seed(one[0], *one[1]) == derive_seed(other[0], *other[1])
    assert same == (typed[0] == typed[1])


def test_a_seed_is_the_sha256_of_its_labels_with_their_lengths():
    parts = [b"silotune seed", b"i12", b"snoise", b"i3"]
    text = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    assert derive_seed(12, "noise", 3) == hashlib.sha256(text).digest()
