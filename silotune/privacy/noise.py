"""Gaussian noise from a cryptographic keystream, sampled and added in integers.

A textbook sampler (uniform floats, logarithm, cosine, then ``sum + noise`` in float32) leaks through
the low-order bits: which floats it can reach depends on the value that it hides (Mironov, "On
significance of the least significant bits for differential privacy", CCS 2012; Holohan and Braghin,
"Secure random sampling in differential privacy", ESORICS 2021; Casacuberta et al., "Widespread
underestimation of sensitivity in differentially private libraries", CCS 2022). The remedy here is the
one of Canonne, Kamath and Steinke (NeurIPS 2020) and of Kairouz, Liu and Steinke (ICML 2021): value
and noise are integers on one common grid, so every result is reachable from every value.

**Noise.** In units of a grid of ``std * (1 + 2**-20) / (800 * 2**32)``, about ``2**-41.6 std``, a
draw is ``2**32 K + U1 + U2 + U3``. K is a discrete Gaussian of parameter 800, drawn from an alias
table (Walker 1974; Vose 1991) whose integer weights sum to ``2**96``; the U are uniform on
``{0, ..., 2**32 - 1}`` and fill the gaps between the multiples of ``2**32``. No floating-point
function takes part. By Poisson summation the density is that of a Gaussian plus three independent
uniforms (adding those is post-processing, so it costs no privacy), times ``1 + e``: the uniforms'
spectra have a threefold zero at every alias frequency, which leaves at z standard deviations a
ripple e of at most ``2 (2 pi 800)**-3 |z**3 - 3 z|``, 3e-11 at z = 1 and 3e-9 at z = 6. What that
can change in the privacy loss of a release of a million numbers is of the order of 1e-7. Rounded
weights and the cut at 10.2 standard deviations are off by less than ``2**-78`` in total variation a
number.

**Addition.** A sum is rounded to the grid, the integers are added, and only that exact result is
rounded to float64 and float32, which is post-processing. Rounding D coordinates adds at most
``grid * sqrt(D)`` to the l2 distance of neighbouring sums. The factor ``1 + 2**-20`` more than pays
for it as long as ``sigma * sqrt(D) <= 2**21``: sigma up to 2,000 at a million parameters. So the
noise may be accounted for as a Gaussian of standard deviation ``std``.

**Keystream.** AES-256 in counter mode (NIST SP 800-38A). The first 32 bytes of every keystream
become the next key and are used for nothing else (fast key erasure, Bernstein 2017), so no key is
ever used twice and a later key does not give away earlier noise.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from silotune.errors import SelfCheckFailed

if TYPE_CHECKING:  # a coordinator has this module and no need of PyTorch, which is 200 MB
    from torch import Tensor

_INDEX_BITS = 14
_COLUMNS = 1 << _INDEX_BITS
_COIN_BITS = 32 - _INDEX_BITS
_LAZY_BITS = 64
_COLUMN_WEIGHT = 1 << (_COIN_BITS + _LAZY_BITS)
_COARSE_STD = 800
_SPACING = 1 << 32
# Added to 2**32 K + U1 + U2 + U3 to make the mean zero (to within half a grid point).
_CENTRE = -(_COLUMNS // 2) * _SPACING - 3 * (_SPACING - 1) // 2
_STD_RANGE = (1e-30, 1e30)
INFLATION = 1.0 + 2.0**-20
_GRID_PER_STD = INFLATION / (_COARSE_STD * _SPACING)

DRAW_STD = _COARSE_STD * _SPACING  # of the integers that are drawn; they are below DRAW_LIMIT
DRAW_LIMIT = (_COLUMNS // 2 + 3) * _SPACING

_BLOCK = 1 << 14  # draws: all scratch arrays together stay in the second-level cache
_HIGH_HALF = 1 if sys.byteorder == "little" else 0
_KEY_BYTES = 32
_AES_BLOCK = 16

Words = npt.NDArray[np.uint64]
Halves = npt.NDArray[np.uint32]
# Chance that the check of correct noise fails all the same.
_FALSE_ALARM = 1e-9


@runtime_checkable
class NoiseSource(Protocol):
    """Where the private step gets its randomness from."""

    @property
    def secure(self) -> bool:
        """Whether results may be called private: False for anything that can be repeated."""

    def add(self, sums: Tensor, std: float) -> Tensor:
        """``sums`` plus independent N(0, std**2), float32, safe against floating-point attacks."""

    def added(self, values: npt.NDArray[np.floating[Any]], std: float) -> npt.NDArray[np.float32]:
        """The same for an array."""

    def draws(self, n: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Blocks of the integers behind `add`, with where they start; see `DRAW_STD`."""

    def uniform(self, n: int) -> npt.NDArray[np.float64]:
        """Independent uniform numbers in [0, 1), multiples of 2**-53."""


class _KeyedNoise:
    """Both sources: a sampler over an AES-256-CTR keystream that never uses a key twice."""

    secure: ClassVar[bool]

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._lock = threading.Lock()

    def __reduce__(self) -> str:
        # A copy in another process would repeat the same noise, and a difference of two releases
        # with the same noise has none.
        raise TypeError("a noise source can't be copied or sent: its stream must not be repeated")

    def add(self, sums: Tensor, std: float) -> Tensor:
        """Round a sum to the grid, add noise of the same grid, round to float32.

        Parameters
        ----------
        sums : Tensor
            float32 or float64, any shape and device; left as it is. NaN and infinity stay what they
            are: the caller stops on them.
        std : float
            Standard deviation, from 1e-30 to 1e30; the noise's own is about a millionth larger. At
            0 the result is ``sums``: no noise, no protection.

        Returns
        -------
        Tensor
            float32, new, of the same shape and device.

        Raises
        ------
        ValueError
            ``std`` is out of its range, or ``sums`` is of another type.
        """
        import torch

        if sums.dtype not in {torch.float32, torch.float64}:
            raise ValueError(f"noise is added to float32 or float64, not {sums.dtype}")
        noisy = self.added(sums.detach().cpu().contiguous().numpy(), std)
        return torch.from_numpy(noisy).to(sums.device)

    def added(self, values: npt.NDArray[np.floating[Any]], std: float) -> npt.NDArray[np.float32]:
        """`add` for a float32 or float64 array, without PyTorch. Raises `ValueError` as it does."""
        if not (std == 0.0 or _STD_RANGE[0] <= std <= _STD_RANGE[1]):
            raise ValueError(f"the standard deviation of noise is 0 or 1e-30 to 1e30, not {std}")
        if values.dtype not in {np.dtype(np.float32), np.dtype(np.float64)}:
            raise ValueError(f"noise is added to float32 or float64, not {values.dtype}")
        if std == 0.0:
            return values.astype(np.float32)
        shape, values = values.shape, np.ascontiguousarray(values).reshape(-1)
        grid = std * _GRID_PER_STD
        noisy = np.empty(values.size, dtype=np.float32)
        pair = np.empty((2, min(values.size, _BLOCK)), dtype=np.float64)
        for start, draws in self.draws(values.size):
            here = slice(start, start + draws.size)
            exact, noise = pair[:, : draws.size]
            np.copyto(exact, values[here])
            np.divide(exact, grid, out=exact)
            np.rint(exact, out=exact)
            np.copyto(noise, draws)  # below 2**47: exact in float64
            # One correctly rounded addition of two integers: what is lost is post-processing.
            np.add(exact, noise, out=exact)
            np.multiply(exact, grid, out=exact)
            np.copyto(noisy[here], exact, casting="same_kind")
        return noisy.reshape(shape)

    def uniform(self, n: int) -> npt.NDArray[np.float64]:
        """Independent uniform numbers in [0, 1), e.g. for Poisson sampling (``uniform(n) < q``).

        Returns
        -------
        ndarray
            float64 [n], multiples of 2**-53.
        """
        words = next(self._keystream(n, 1))
        return np.asarray((words >> np.uint64(11)) * 2.0**-53, dtype=np.float64)

    def _next_key(self) -> bytes:
        """The key of the next keystream, which replaces it by its first bytes."""
        return self._key

    def _keystream(self, words: int, blocks: int) -> Iterator[Words]:
        """Yield `blocks` times `words` fresh 64-bit words, in one buffer that is overwritten."""
        with self._lock:
            cipher = Cipher(algorithms.AES(self._next_key()), modes.CTR(bytes(_AES_BLOCK)))
            stream = cipher.encryptor()
            self._key = stream.update(bytes(_KEY_BYTES))
        zeros = bytes(8 * words)
        buffer = bytearray(len(zeros) + _AES_BLOCK)
        for _ in range(blocks):
            stream.update_into(zeros, buffer)
            yield np.frombuffer(buffer, dtype=np.uint64, count=words)

    def draws(self, n: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yield (start, integers of standard deviation `DRAW_STD`) until n; overwritten by the next."""
        size = min(n, _BLOCK)
        lookup, third = _Lookup(size), np.empty(size, dtype=np.uint64)
        for number, words in enumerate(self._keystream(2 * size, -(-n // _BLOCK))):
            draws, rest = words[:size], words[size:]
            # High half: the word of K becomes K + 8192. Low half: U1, already where it belongs.
            high = draws.view(np.uint32)[_HIGH_HALF::2]
            lookup.columns(high, self._lazy, out=high)
            np.right_shift(rest, np.uint64(32), out=third)
            np.bitwise_and(rest, np.uint64(_SPACING - 1), out=rest)
            signed = draws.view(np.int64)
            signed += rest.view(np.int64)
            signed += third.view(np.int64)
            signed += _CENTRE
            start = number * _BLOCK
            yield start, signed[: n - start]

    def _lazy(self) -> int:
        """64 more bits of a coin; needed once in 2**18 draws."""
        return int(next(self._keystream(1, 1))[0])


class SecureNoise(_KeyedNoise):
    """Noise keyed by the operating system's generator; nothing can repeat it.

    A process that is forked gets a new key, so parent and child never share noise.
    """

    secure: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(os.urandom(_KEY_BYTES))
        self._pid = os.getpid()

    def _next_key(self) -> bytes:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._key = os.urandom(_KEY_BYTES)
        return self._key


class SeededNoise(_KeyedNoise):
    """The same sampler with a key from a seed: for tests and simulations, never private.

    Parameters
    ----------
    seed : int or bytes
        Equal seeds give equal streams, in any process and whatever torch's or NumPy's own
        generators do; `derive_seed` makes one for each purpose.
    """

    secure: ClassVar[bool] = False

    def __init__(self, seed: int | bytes) -> None:
        super().__init__(_digest([b"silotune seeded noise", _labelled(seed)]))


def noised(
    sums: npt.NDArray[np.floating[Any]],
    stds: Sequence[float],
    sizes: Sequence[int],
    *,
    noise: NoiseSource,
) -> npt.NDArray[np.float32]:
    """Sums that lie one after the other, each with noise of its own standard deviation, and checked.

    Parameters
    ----------
    sums : float32 or float64 array
        All of them.
    stds, sizes : sequence of float, of int
        Of each.
    noise : NoiseSource
        Where it comes from.

    Raises
    ------
    SelfCheckFailed
        The noise is not what was asked for (false alarms: at most 1e-9).
    """
    made, start, squares = np.empty(len(sums), dtype=np.float32), 0, 0.0
    for std, size in zip(stds, sizes, strict=True):
        here = slice(start, start + size)
        made[here] = noise.added(sums[here], std)
        if std:
            squares += float(np.sum(np.square((made[here] - sums[here]) / std, dtype=np.float64)))
        start += size
    if any(stds) and not noise_is_plausible(squares, len(sums)):
        raise SelfCheckFailed("the noise of an update is not what was asked for")
    return made


def noise_for(seed: int | None, *labels: str | int) -> NoiseSource:
    """Secret noise, or for a plan with a seed that of one purpose (`derive_seed`)."""
    return SecureNoise() if seed is None else SeededNoise(derive_seed(seed, *labels))


def derive_seed(plan_seed: int, *labels: str | int) -> bytes:
    """A seed for one purpose, e.g. one site, round and use.

    Parameters
    ----------
    plan_seed : int
        The plan's seed.
    *labels : str or int
        What it is for. Each is hashed with its type and length, so ``("a", "bc")`` and
        ``("ab", "c")``, or ``1`` and ``"1"``, give unrelated seeds.

    Returns
    -------
    bytes
        32 bytes, SHA-256 (FIPS 180-4).
    """
    return _digest([b"silotune seed", _labelled(plan_seed), *map(_labelled, labels)])


def _labelled(value: str | int | bytes) -> bytes:
    if isinstance(value, bytes):
        return b"b" + value
    return b"s" + value.encode() if isinstance(value, str) else b"i" + str(value).encode()


def _digest(parts: Sequence[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.digest()


class _Lookup:
    """The alias table's lookup over blocks of one size, without allocating."""

    def __init__(self, size: int) -> None:
        self._index = np.empty(size, dtype=np.uint32)
        self._entry = np.empty(size, dtype=np.uint32)
        self._coin = np.empty(size, dtype=np.uint32)
        self._mask = np.empty(size, dtype=np.uint32)
        self._flag = np.empty(size, dtype=np.bool_)
        self._place = np.empty(size, dtype=np.intp)
        self._entries, self._rests = alias_table()

    def columns(self, words: Halves, lazy: Callable[[], int], *, out: Halves) -> None:
        """Column K + 8192 for each word: 14 bits choose the column, 18 bits toss its coin."""
        index, entry, coin, mask = self._index, self._entry, self._coin, self._mask
        np.right_shift(words, np.uint32(_COIN_BITS), out=index)
        np.left_shift(words, np.uint32(_INDEX_BITS), out=coin)
        np.copyto(self._place, index)
        np.take(self._entries, self._place, out=entry, mode="clip")
        np.bitwise_xor(coin, entry, out=mask)
        np.less(mask, np.uint32(_COLUMNS), out=self._flag)
        tied = np.flatnonzero(self._flag)
        np.bitwise_or(coin, np.uint32(_COLUMNS - 1), out=coin)
        np.less(coin, entry, out=self._flag)
        for place in tied:
            self._flag[place] = lazy() < self._rests[index[place]]
        # The index where the flag is set, else the alias: without a branch for each number.
        np.copyto(mask, self._flag)
        np.negative(mask, out=mask)
        np.bitwise_and(entry, np.uint32(_COLUMNS - 1), out=entry)
        np.bitwise_xor(index, entry, out=index)
        np.bitwise_and(index, mask, out=index)
        np.bitwise_xor(index, entry, out=out)


@lru_cache(maxsize=1)
def alias_table() -> tuple[Halves, tuple[int, ...]]:
    """Alias table of the discrete Gaussian with parameter 800 on {-8191, ..., 8191}.

    Returns
    -------
    entries : ndarray of uint32 [16384]
        High 18 bits: the first bits of the column's 82-bit threshold; low 14 bits: its alias.
    rests : tuple of int
        The threshold's other 64 bits, looked at when the first 18 tie.
    """
    weights = coarse_weights()
    thresholds, aliases = list(weights), list(range(_COLUMNS))
    small = [i for i, w in enumerate(weights) if w < _COLUMN_WEIGHT]
    large = [i for i, w in enumerate(weights) if w > _COLUMN_WEIGHT]
    while small:
        poor, rich = small.pop(), large[-1]
        aliases[poor] = rich
        thresholds[rich] -= _COLUMN_WEIGHT - thresholds[poor]
        if thresholds[rich] <= _COLUMN_WEIGHT:
            large.pop()
            if thresholds[rich] < _COLUMN_WEIGHT:
                small.append(rich)
    # A full column is its own alias, whatever its coin says.
    thresholds = [t % _COLUMN_WEIGHT for t in thresholds]
    pairs = zip(thresholds, aliases, strict=True)
    entries = [(t >> _LAZY_BITS) << _INDEX_BITS | alias for t, alias in pairs]
    rests = tuple(t % (1 << _LAZY_BITS) for t in thresholds)
    return np.array(entries, dtype=np.uint32), rests


def coarse_weights() -> list[int]:
    """Weights of K = -8192, ..., 8191: ``exp(-K**2 / (2 * 800**2))`` scaled to a sum of 2**96.

    In decimal arithmetic of 60 digits, so that the table is the same on every machine; symmetric,
    the rounding error of the whole (below 2**14) is in the middle one.
    """
    half = _COLUMNS // 2
    with localcontext() as context:
        context.prec = 60
        step = (Decimal(-1) / (2 * _COARSE_STD**2)).exp()
        square = step * step
        values, ratio = [Decimal(1)], step  # exp(-k^2 c): each is the last times step^(2k+1)
        for _ in range(1, half):
            values.append(values[-1] * ratio)
            ratio *= square
        total = values[0] + 2 * sum(values[1:])
        scale = Decimal(_COLUMN_WEIGHT * _COLUMNS) / total
        side = [int((value * scale).to_integral_value()) for value in values]
    side[0] = _COLUMN_WEIGHT * _COLUMNS - 2 * sum(side[1:])
    return [0, *reversed(side[1:]), *side]


def noise_is_plausible(chi_square: float, count: int) -> bool:
    """Whether a sum of squares fits `count` independent standard normals.

    Both tails are bounded by Chernoff: for ``X ~ chi^2_n`` and ``u = x / n``, ``P(X >= x)`` for
    ``u > 1`` and ``P(X <= x)`` for ``u < 1`` are at most ``exp(-n/2 (u - 1 - ln u))``. Correct noise
    fails with a probability of at most 1e-9. A standard deviation that is off by 5 % is caught from
    9,000 numbers on, one that is off by 2 % from 55,000 on, and noise left out always.
    """
    ratio = chi_square / count
    if not (ratio > 0.0 and math.isfinite(ratio)):
        return False
    return count / 2 * (ratio - 1.0 - math.log(ratio)) <= math.log(2.0 / _FALSE_ALARM)
