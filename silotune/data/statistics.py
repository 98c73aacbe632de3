"""What one site's records add to a plan's statistics: a sum over units of vectors of length 1 at most.

`silotune.plan.counted` says what the parts are. Here a unit's part is made of its records' *shares*
of the unit: each of n records that have something to count counts 1/n. Whatever a unit's records hold,
and however many there are, its part so has length 1 at most.

The bound holds to the last bit. Shares are whole numbers of ``2**-30``, rounded towards zero, so that a
unit never adds more than its bound; and sums of whole numbers have no rounding, through which one unit
could move what all others add (Casacuberta et al., CCS 2022). Only the finished sum is a float.

No record can make it fail, or decide what else is counted: a number that is none, is not finite or is
missing counts as missing, and a text that its tokenizer does not take as one without a length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from silotune.data.records import Records
from silotune.data.targets import number_of
from silotune.models.layout import statistics_layout
from silotune.plan.counted import number_key, part_scale
from silotune.plan.plan import Plan
from silotune.plan.statistics import NumberSection

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
CountTokens = Callable[[Sequence[str]], Sequence[int]]

_ONE = 1 << 30  # a unit's whole share, in units of 2**-30: a sum has room for 2**33 units
_TOGETHER = 1_000  # texts that are given to a tokenizer at once


def site_sums(records: Records, plan: Plan, *, count_tokens: CountTokens | None = None) -> Floats:
    """The sum of what all units of a site add.

    Parameters
    ----------
    records : Records
        Of `silotune.data.records.load_records`, for this plan.
    plan : Plan
        With ``model.task = "statistics"``.
    count_tokens : callable, optional
        Lengths of texts in tokens; needed if the plan counts in tokens.

    Returns
    -------
    float64 array [size of `statistics_layout`]
        One unit more or less moves it by a vector of length 1 at most.
    """
    units, counter = records.n_units(), _PartCounter(records, plan, count_tokens)
    parts = [
        counter.part(entry.name, entry.size) if units else np.zeros(entry.size, dtype=np.int64)
        for entry in statistics_layout(plan).entries
    ]
    whole: Integers = np.concatenate(parts)
    return whole.astype(np.float64) * (part_scale(plan) / _ONE)


class _PartCounter:
    """The parts of one site's sum, as whole numbers of ``1 / _ONE``."""

    def __init__(self, records: Records, plan: Plan, count_tokens: CountTokens | None) -> None:
        assert plan.statistics is not None
        self._records, self._plan, self._asked = records, plan, plan.statistics
        self._count_tokens = count_tokens

    def part(self, name: str, size: int) -> Integers:
        if name == "units":
            return np.array([self._records.n_units() * _ONE], dtype=np.int64)
        if name == "labels":
            return self._histogram(self._labels(), size)
        if name == "records_a_unit":
            return self._sizes(size)
        if name == "lengths":
            assert self._asked.lengths is not None
            return self._histogram(_binned(self._lengths(), self._asked.lengths.edges), size)
        _, number, kind = name.split(".")
        asked = self._asked.numbers[number]
        values = self._values(number, asked)
        return (
            self._mean(values, asked)
            if kind == "mean"
            else self._histogram(_binned(values, asked.edges), size)
        )

    def _labels(self) -> Integers:
        """The number of each record's label; -1 for one that the plan lacks."""
        index = {label: number for number, label in enumerate(self._plan.model.labels)}
        return np.array([index.get(r["label"], -1) for r in self._records.examples], dtype=np.int64)

    def _lengths(self) -> Floats:
        """Each record's length; NaN where it has none."""
        asked = self._asked.lengths
        assert asked is not None
        texts = [record[asked.of] for record in self._records.examples]
        if asked.counted == "words":
            return np.array([len(text.split()) for text in texts], dtype=np.float64)
        assert self._count_tokens is not None
        return _in_tokens(texts, self._count_tokens)

    def _values(self, name: str, asked: NumberSection) -> Floats:
        """Each record's value within the declared bounds; NaN where there is none."""
        key = number_key(name)
        found = np.array([number_of(record.get(key, "")) for record in self._records.examples])
        return np.asarray(np.clip(found, asked.lower, asked.upper), dtype=np.float64)

    def _shares(self, has: NDArray[np.bool_]) -> Integers:
        """Each record's share of its unit: equal ones for those that have something to count."""
        unit_of = self._records.unit_of
        counted = np.bincount(unit_of[has], minlength=self._records.n_units())
        return np.where(has, _ONE // np.maximum(counted, 1)[unit_of], 0).astype(np.int64)

    def _histogram(self, bins: Integers, size: int) -> Integers:
        """Shares by bin; a record in bin -1 has nothing to count."""
        has, total = bins >= 0, np.zeros(size, dtype=np.int64)
        np.add.at(total, bins[has], self._shares(has)[has])
        return total

    def _sizes(self, size: int) -> Integers:
        counted = np.bincount(self._records.unit_of).astype(np.float64)
        bins = _binned(counted, self._asked.records_a_unit)
        return np.bincount(bins, minlength=size).astype(np.int64) * _ONE

    def _mean(self, values: Floats, asked: NumberSection) -> Integers:
        """Sum of the units' means, from -1 to 1, and their number; both over the root of 2."""
        has = np.isfinite(values)
        centred = 2.0 * (np.where(has, values, asked.lower) - asked.lower)
        centred = np.clip(centred / (asked.upper - asked.lower) - 1.0, -1.0, 1.0)
        whole = math.floor(_ONE / math.sqrt(2.0))
        shares = self._shares(has) * (whole / _ONE)
        mean = np.trunc(shares * centred).astype(np.int64).sum()
        units = len(np.unique(self._records.unit_of[has])) * whole
        return np.array([mean, units], dtype=np.int64)


def _binned(values: Floats, edges: Sequence[float]) -> Integers:
    """The bin of each value, the edge itself belonging to the upper; -1 for NaN."""
    bins = np.searchsorted(np.asarray(edges, dtype=np.float64), values, side="right")
    return np.where(np.isnan(values), -1, bins).astype(np.int64)


def _in_tokens(texts: Sequence[str], count: CountTokens) -> Floats:
    found = np.full(len(texts), math.nan)
    for start in range(0, len(texts), _TOGETHER):
        part = texts[start : start + _TOGETHER]
        try:
            found[start : start + len(part)] = count(part)
        except Exception:
            # About one of them, and nobody may learn it: alone, it has no length.
            found[start : start + len(part)] = [*_apart(part, count)]
    return found


def _apart(texts: Iterable[str], count: CountTokens) -> Iterable[float]:
    for text in texts:
        length = math.nan
        with suppress(Exception):
            length = float(count([text])[0])
        yield length
