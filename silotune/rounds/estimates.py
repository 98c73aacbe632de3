"""What the noisy sums of a statistics run say: numbers with intervals, and nothing below the floor.

All of it is post-processing of the sums, which are what was released. Every number of a sum has
independent Gaussian noise of one known variance, so the intervals are those of the noise alone: they
say where the true figure of the sites' records is, not where that of some larger population would be.

- A *share* is the ratio of two noisy numbers, the group's and that of all units, with the interval of
  the linear approximation (the delta method).
- A *quantile* is read off a histogram whose negative groups are set to zero, within a group as if it
  were evenly filled. Its interval ends at edges of groups: those in which the quantile can lie by the
  pointwise interval of the cumulated shares, so it covers at least as often as it says.
- *Not shown* is whatever rests on fewer units than the floor of the plan, or than `NOISE_FLOOR` standard
  deviations of its own noise.

`find` gives plain data, which is what statistics.json holds and the event ``statistics`` carries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.events.schema import STATISTICS_FORMAT
from silotune.models.layout import Vector, statistics_layout
from silotune.plan.counted import part_scale
from silotune.plan.plan import Plan
from silotune.plan.statistics import LengthsSection, NumberSection

NOISE_FLOOR = 2.0
"""Standard deviations of the noise that a group must have, to be shown."""

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)

Floats = NDArray[np.float64]
Estimate = dict[str, float]


def find(
    plan: Plan,
    sums: Vector,
    *,
    variance: float,
    sites: Sequence[str],
    declared: Mapping[str, int],
) -> dict[str, Any]:
    """The statistics of a run.

    Parameters
    ----------
    plan : Plan
        With ``model.task = "statistics"``.
    sums : float32 array
        The noisy sum over sites, by `statistics_layout`.
    variance : float
        Of the noise on each of its numbers.
    sites : sequence of str
        Sites that are in the sum.
    declared : mapping of site to int
        Units that they declare.

    Returns
    -------
    dict
        Plain data. An estimate is ``{"value", "low", "high"}``, or null where it is not shown.
    """
    asked, privacy = plan.statistics, plan.privacy
    assert asked is not None and privacy.epsilon is not None and privacy.delta is not None
    parts = statistics_layout(plan).unpack(np.ascontiguousarray(sums, dtype=np.float32))
    scale = part_scale(plan)
    counted = {name: np.asarray(part, dtype=np.float64) / scale for name, part in parts.items()}
    deviation = math.sqrt(variance) / scale
    found = _Estimator(
        deviation=deviation,
        floor=max(asked.floor, NOISE_FLOOR * deviation),
        level=NormalDist().inv_cdf(0.5 + asked.confidence / 2.0),
        units=float(counted["units"][0]),
    )
    return {
        "format": STATISTICS_FORMAT,
        "plan_sha256": plan.sha256,
        "dataset": plan.data.dataset,
        "unit": privacy.unit,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "private": plan.plan.seed is None,
        "confidence": asked.confidence,
        "noise": deviation,
        "floor": found.floor,
        "sites": {site: {"declared_units": declared.get(site)} for site in sites},
        "units": found.count(found.units),
        "labels": _labels(found, plan.model.labels, counted.get("labels")),
        "records_a_unit": _records(found, asked.records_a_unit, counted.get("records_a_unit")),
        "lengths": _lengths(found, asked.lengths, plan, counted.get("lengths")),
        "numbers": {
            name: _number(found, number, name, counted) for name, number in asked.numbers.items()
        },
    }


@dataclass(frozen=True, kw_only=True)
class _Estimator:
    """Intervals and the floor, for noise of one deviation.

    Attributes
    ----------
    deviation : float
        Of the noise on every number, in units.
    floor : float
        What must be reached to be shown.
    level : float
        Half an interval, in standard deviations.
    units : float
        The noisy number of all units.
    """

    deviation: float
    floor: float
    level: float
    units: float

    def count(self, value: float) -> Estimate | None:
        """A number of units; none below the floor."""
        return self._around(value, self.deviation) if value >= self.floor else None

    def share(self, value: float) -> Estimate | None:
        """A group's part of all units."""
        if min(value, self.units) < self.floor:
            return None
        part = value / self.units
        error = self.deviation * math.hypot(1.0, part) / self.units
        return self._around(part, error, most=1.0)

    def mean(self, total: float, units: float, *, floor: float) -> Estimate | None:
        """The ratio of two noisy numbers of one deviation, from -1 to 1."""
        if units < floor:
            return None
        part = total / units
        error = math.sqrt(2.0) * self.deviation * math.hypot(1.0, part) / units
        return self._around(part, error, least=-1.0, most=1.0)

    def _around(
        self, value: float, error: float, *, least: float = 0.0, most: float = math.inf
    ) -> Estimate:
        ends = (value, value - self.level * error, value + self.level * error)
        middle, low, high = (min(max(end, least), most) for end in ends)
        return {"value": middle, "low": low, "high": high}

    def bins(self, counts: Floats, ends: Sequence[tuple[float | None, float | None]]) -> list[Any]:
        """A histogram, bin by bin."""
        return [
            {"from": low, "to": high, "share": self.share(float(count))}
            for (low, high), count in zip(ends, counts, strict=True)
        ]

    def quantiles(
        self, counts: Floats, ends: Sequence[tuple[float | None, float | None]]
    ) -> list[dict[str, Any]]:
        """Where the cumulated histogram reaches some shares."""
        whole = float(counts.sum())
        noise = self.deviation * math.sqrt(len(counts))
        if whole < max(self.floor, NOISE_FLOOR * noise):
            return [{"q": q, "value": None, "low": None, "high": None} for q in QUANTILES]
        below = np.concatenate([[0.0], np.cumsum(counts)]) / whole
        number = np.arange(len(counts) + 1)
        spread = (1.0 - below) ** 2 * number + below**2 * (len(counts) - number)
        margin = self.level * self.deviation * np.sqrt(np.maximum(spread, 0.0)) / whole
        margin[[0, -1]] = 0.0  # all of the histogram lies between its ends
        filled = np.cumsum(np.maximum(counts, 0.0))
        return [_quantile(q, filled / filled[-1], below, margin, ends) for q in QUANTILES]


def _quantile(
    q: float,
    filled: Floats,
    below: Floats,
    margin: Floats,
    ends: Sequence[tuple[float | None, float | None]],
) -> dict[str, Any]:
    """One quantile, its interval the bins where it can be; an end that is open is null."""
    at = min(int(np.searchsorted(filled, q)), len(filled) - 1)
    before = float(filled[at - 1]) if at else 0.0
    low, high = ends[at]
    inside = (q - before) / (float(filled[at]) - before) if filled[at] > before else 0.5
    value = (
        (low if low is not None else high)
        if low is None or high is None
        else low + inside * (high - low)
    )
    can_reach = np.flatnonzero((below + margin)[1:] >= q)
    can_begin = np.flatnonzero((below - margin)[:-1] < q)
    return {"q": q, "value": value, "low": ends[can_reach[0]][0], "high": ends[can_begin[-1]][1]}


def _whole(edges: Sequence[float], first: float) -> list[tuple[float | None, float | None]]:
    """Bins of whole numbers: first and last that are in each; the last is open."""
    starts = [first, *edges]
    return [
        (start, None if number == len(edges) else edges[number] - 1)
        for number, start in enumerate(starts)
    ]


def _between(edges: Sequence[float], low: float, high: float) -> list[tuple[float, float]]:
    ends = [low, *edges, high]
    return list(pairwise(ends))


def _labels(
    found: _Estimator, labels: Sequence[str], counts: Floats | None
) -> list[dict[str, Any]] | None:
    if counts is None:
        return None
    pairs = zip(labels, counts, strict=True)
    return [{"label": label, "share": found.share(float(count))} for label, count in pairs]


def _records(
    found: _Estimator, edges: Sequence[float], counts: Floats | None
) -> dict[str, Any] | None:
    if counts is None:
        return None
    ends = _whole(edges, 1.0)
    return {"bins": found.bins(counts, ends), "quantiles": found.quantiles(counts, ends)}


def _lengths(
    found: _Estimator, asked: LengthsSection | None, plan: Plan, counts: Floats | None
) -> dict[str, Any] | None:
    if asked is None or counts is None:
        return None
    ends = _whole(asked.edges, 0.0)
    return {
        "of": asked.of,
        "counted": asked.counted,
        "model": plan.model.base or None,
        "bins": found.bins(counts, ends),
        "quantiles": found.quantiles(counts, ends),
    }


def _number(
    found: _Estimator, asked: NumberSection, name: str, counted: Mapping[str, Floats]
) -> dict[str, Any]:
    total, units = (float(value) for value in counted[f"numbers.{name}.mean"] * math.sqrt(2.0))
    floor = max(found.floor, NOISE_FLOOR * math.sqrt(2.0) * found.deviation)
    centred = found.mean(total, units, floor=floor)
    middle, half = (asked.lower + asked.upper) / 2.0, (asked.upper - asked.lower) / 2.0
    histogram = counted.get(f"numbers.{name}.histogram")
    ends = _between(asked.edges, asked.lower, asked.upper)
    error = math.sqrt(2.0) * found.deviation * found.level
    held = {"value": units, "low": max(units - error, 0.0), "high": units + error}
    return {
        "lower": asked.lower,
        "upper": asked.upper,
        "units": held if units >= floor else None,
        "mean": centred and {key: middle + half * value for key, value in centred.items()},
        "bins": None if histogram is None else found.bins(histogram, ends),
        "quantiles": None if histogram is None else found.quantiles(histogram, ends),
    }
