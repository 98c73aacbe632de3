"""Texts that resemble each other, and who of them is on the other side of a split.

Case, digits and punctuation aside, two short texts are look-alikes if they are the same, or one word is
replaced, added, left out or moved; two long ones if four fifths of their sequences of three words are
the same. The first is found exactly, by the text without each of its words in turn. The second is found
by MinHash (Broder, 1997): 128 minima estimate the share, 16 bands of 8 find whom to compare (Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3). Of pairs that share four fifths some 19
in 20 are candidates; what is found was compared, with a standard error of 0.035.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

# Chinese and Japanese don't put spaces between words: each character counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+")
_SHORT, _FEWEST, _SHINGLE = 24, 4, 3
_MINIMA, _BANDS, _ALIKE = 128, 16, 0.8
_NEIGHBOURS = 8  # of a band, that a text is compared with
_AT_ONCE = 1 << 16

Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]


def words_of(text: str) -> list[str]:
    """The words of a text, lower case, without digits and punctuation."""
    return _WORD.findall(text.casefold())


class _Permutations:
    """The 128 affine maps of 32-bit numbers whose minima stand for a text."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self._factors = rng.integers(1, 2**31, _MINIMA, dtype=np.uint32)[:, None] * 2 + 1
        self._terms = rng.integers(0, 2**32, _MINIMA, dtype=np.uint32)[:, None]

    def minima(self, words: Sequence[str]) -> NDArray[np.uint32]:
        size = len(words) - _SHINGLE + 1
        shingles = (" ".join(words[i : i + _SHINGLE]) for i in range(size))
        numbers = np.array([crc32(shingle.encode()) for shingle in shingles], dtype=np.uint32)
        least: NDArray[np.uint32] = (self._factors * numbers + self._terms).min(axis=1)
        return least


@dataclass(frozen=True, eq=False)
class Sketches:
    """What is kept of texts to compare them.

    Attributes
    ----------
    exact : int64 array of shape [n]
        A hash of each text's words.
    keys, owners : int64 arrays of shape [k]
        Hashes of short texts without one of their words, and the text of each.
    minima : uint32 array of shape [long, 128]
        MinHash of long texts.
    long : int64 array of shape [long]
        Which texts these are.
    sizes : int64 array of shape [long]
        How many words each has.
    """

    exact: Rows
    keys: Rows
    owners: Rows
    minima: NDArray[np.uint32]
    long: Rows
    sizes: Rows

    @classmethod
    def of(
        cls,
        texts: Iterable[str],
        *,
        labels: Sequence[str] | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> Sketches:
        """Read texts once; with `labels`, only texts of one label can be alike."""
        permutations = _Permutations()
        exact, keys, owners, long, sizes = (array("q") for _ in range(5))
        minima: list[NDArray[np.uint32]] = []
        for row, text in enumerate(texts):
            words = words_of(text)
            label = labels[row] if labels is not None else ""
            exact.append(_hashed(label, words))
            if len(words) > _SHORT:
                minima.append(permutations.minima([f"{label} {word}" for word in words]))
                long.append(row)
                sizes.append(len(words))
            elif len(words) >= _FEWEST:  # without one of two words, many texts would look alike
                own = {_hashed(label, words[:at] + words[at + 1 :]) for at in range(len(words))}
                own.add(exact[-1])
                keys.extend(own)
                owners.extend([row] * len(own))
            advance()
        return cls(
            _rows(exact),
            _rows(keys),
            _rows(owners),
            np.array(minima, dtype=np.uint32).reshape(-1, _MINIMA),
            _rows(long),
            _rows(sizes),
        )

    def pairs(self, held_out: Bools) -> tuple[Rows, Rows]:
        """Look-alikes, two arrays of one length; each of a group stands beside its first one.

        Held-out texts stand beside the first of the training texts too.
        """
        first, second = _grouped(self.exact, np.arange(len(self.exact)), held_out)
        found = [(first, second), _grouped(self.keys, self.owners, held_out)]
        bands = self.minima.reshape(len(self.long), _BANDS, _MINIMA // _BANDS)
        for band in range(_BANDS):
            found.append(self._alike(_one_number(bands[:, band])))
        one = np.concatenate([a for a, _ in found])
        other = np.concatenate([b for _, b in found])
        return one, other

    def _alike(self, key: Rows) -> tuple[Rows, Rows]:
        """Long texts with one key that are alike; those of like length are compared."""
        order = np.lexsort((self.sizes, key))
        one, other = [_rows()], [_rows()]
        for lag in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
            same = key[order[lag:]] == key[order[:-lag]]
            a, b = order[lag:][same], order[:-lag][same]
            for start in range(0, len(a), _AT_ONCE):
                x, y = a[start : start + _AT_ONCE], b[start : start + _AT_ONCE]
                alike = (self.minima[x] == self.minima[y]).mean(axis=1) >= _ALIKE
                one.append(self.long[x[alike]])
                other.append(self.long[y[alike]])
        return np.concatenate(one), np.concatenate(other)

    def resembling(self, asked: Rows, among: Rows) -> Bools:
        """Which texts `among` others each text `asked` resembles, of shape [asked, among]."""
        place = np.full(len(self.exact), -1, dtype=np.int64)
        place[among] = np.arange(len(among))
        found = np.zeros((len(asked), len(among)), dtype=bool)
        for keys, owners in (
            (self.exact, np.arange(len(self.exact))),
            (self.keys, self.owners),
        ):
            order = np.argsort(keys, kind="stable")
            ordered, rows = keys[order], place[owners[order]]
            starts = np.searchsorted(owners, asked), np.searchsorted(owners, asked, side="right")
            for number, (start, end) in enumerate(zip(*starts, strict=True)):
                own = keys[start:end]
                low = np.searchsorted(ordered, own)
                high = np.searchsorted(ordered, own, side="right")
                for a, b in zip(low, high, strict=True):
                    alike = rows[a:b]
                    found[number, alike[alike >= 0]] = True
        own_minima = {int(row): at for at, row in enumerate(self.long)}
        those = np.array([own_minima.get(int(row), -1) for row in among], dtype=np.int64)
        theirs = self.minima[those[those >= 0]]
        for number, row in enumerate(asked.tolist()):
            if row in own_minima:
                alike = (theirs == self.minima[own_minima[row]]).mean(axis=1) >= _ALIKE
                found[number, np.flatnonzero(those >= 0)[alike]] = True
        return found


@dataclass(frozen=True, eq=False)
class Twins:
    """Which texts resemble which: private.

    Attributes
    ----------
    copies : bool array of shape [n]
        The text stands among the earlier ones already, word by word.
    repeats : bool array of shape [n]
        An earlier text is its look-alike; copies are among them.
    in_training : int64 array of shape [n]
        A training text that a held-out one resembles; -1 where there is none.
    """

    copies: Bools
    repeats: Bools
    in_training: Rows


def find_twins(sketches: Sketches, held_out: Bools) -> Twins:
    """Say of each text whether an earlier one, or one on the other side of the split, is alike."""
    size = len(held_out)
    copies, repeats = np.ones(size, dtype=bool), np.zeros(size, dtype=bool)
    _, first = np.unique(sketches.exact, return_index=True)
    copies[first] = False
    one, other = sketches.pairs(held_out)
    repeats[np.maximum(one, other)] = True
    across = held_out[one] != held_out[other]
    tested = np.where(held_out[one], one, other)[across]
    trained = np.where(held_out[one], other, one)[across]
    in_training = np.full(size, -1, dtype=np.int64)
    in_training[tested] = trained
    return Twins(copies, repeats | copies, in_training)


def _grouped(keys: Rows, rows: Rows, held_out: Bools) -> tuple[Rows, Rows]:
    """Each row of a key beside the least one, and each held-out beside the least training row."""
    order = np.lexsort((rows, keys))
    keys, rows = keys[order], rows[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1)) if len(keys) else _rows()
    sizes = np.diff(starts, append=len(keys))
    if not len(starts):
        return _rows(), _rows()
    least = np.repeat(rows[starts], sizes)
    trained = np.where(held_out[rows], np.iinfo(np.int64).max, rows)
    least_trained = np.repeat(np.minimum.reduceat(trained, starts), sizes)
    across = held_out[rows] & (least_trained < np.iinfo(np.int64).max)
    one = np.concatenate([rows, rows[across]])
    other = np.concatenate([least, least_trained[across]])
    apart = one != other
    return one[apart], other[apart]


def _one_number(parts: NDArray[np.uint32]) -> Rows:
    """The eight minima of a band as one hash."""
    rng = np.random.default_rng(11)
    odd = rng.integers(1, 2**62, parts.shape[1], dtype=np.int64) * 2 + 1
    with np.errstate(over="ignore"):
        mixed: Rows = (parts.astype(np.int64) * odd).sum(axis=1)
    return mixed


def _hashed(label: str, words: Sequence[str]) -> int:
    """64 bits that are the same in every process."""
    text = "\x1f".join((label, *words)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True)


def _rows(numbers: Sequence[int] | array[int] = ()) -> Rows:
    return np.array(numbers, dtype=np.int64)
