"""Figures of a model on labelled records, and the bootstrap interval of each over privacy units.

A draw of the bootstrap takes as many units as there are, with replacement, each with all of its records
(Efron and Tibshirani, "An introduction to the bootstrap", 1993, percentile intervals): records of one
patient are no independent evidence. scikit-learn does the arithmetic of ranks and curves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from silotune.errors import EnvironmentFault
from silotune.inference.evaluated import Figure
from silotune.models.scores import metrics_of, of_cells, of_confusion
from silotune.plan.plan import Plan

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Values = Mapping[str, float]
"""Figures by name; NaN where one is not defined."""

_MOST_UNDEFINED = 0.05  # of the draws, for an interval all the same
_HOLDS = 0.5  # a label of several is answered from this probability on


class Observed(ABC):
    """What a model said of records, beside what is true of them."""

    @abstractmethod
    def measure(self, rows: Ints) -> Values:
        """Figures of some rows, each as often as it is named: quickly, for a draw of the bootstrap."""

    def point(self, rows: Ints) -> Values:
        """The same figures, as they are reported."""
        return self.measure(rows)


def require_sklearn() -> None:
    """Check that scikit-learn is here. Raises `EnvironmentFault`."""
    try:
        import sklearn  # noqa: F401
    except ImportError as exc:
        raise EnvironmentFault(
            "an evaluation needs scikit-learn", remedy="pip install 'silotune[evaluate]'"
        ) from exc


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled(Observed):
    """Records with labels, each of which has a probability.

    Attributes
    ----------
    shares : float array [records, labels]
        The probabilities.
    names : tuple of str
        The labels.
    """

    shares: Floats
    names: tuple[str, ...]

    @property
    @abstractmethod
    def holds(self) -> Bools:
        """Which labels hold [records, labels]."""

    @property
    @abstractmethod
    def said(self) -> Bools:
        """Which labels are answered [records, labels]."""

    @abstractmethod
    def together(self, rows: Ints) -> dict[str, float]:
        """Figures of all labels together."""

    def measure(self, rows: Ints) -> Values:
        """Figures of all labels together, then of each one as ``auroc/LABEL``."""
        return self._figures(rows, self._ranked)

    def point(self, rows: Ints) -> Values:
        """The same, with areas by scikit-learn."""
        return self._figures(rows, self._by_sklearn)

    def _figures(self, rows: Ints, areas_of: Callable[[Ints, int], tuple[float, float]]) -> Values:
        found = self.together(rows)
        holds, said = self.holds[rows], self.said[rows]
        there, answered, right = holds.sum(0), said.sum(0), (holds & said).sum(0)
        areas = []
        for place, name in enumerate(self.names):
            found |= of_one_label(name, right[place], answered[place], there[place])
            found[f"auroc/{name}"], found[f"average_precision/{name}"] = areas_of(rows, place)
            areas.append(found[f"auroc/{name}"])
        defined = [area for area in areas if not math.isnan(area)]
        return {**found, "auroc": float(np.mean(defined)) if defined else math.nan}

    @cached_property
    def _codes(self) -> Ints:
        """Of each record and label [records, labels], the place of its score among those that occur."""
        codes = [np.unique(scores, return_inverse=True)[1] for scores in self.shares.T]
        return np.stack(codes, axis=1)

    def _ranked(self, rows: Ints, place: int) -> tuple[float, float]:
        """Area under the ROC curve and average precision of a label against all others.

        From how often each score occurs on either side; a bootstrap asks a thousand times.
        """
        codes, is_it = self._codes[rows, place], self.holds[rows, place]
        positive = np.bincount(codes[is_it], minlength=int(codes.max()) + 1)[::-1]
        negative = np.bincount(codes[~is_it], minlength=len(positive))[::-1]
        m, n = positive.sum(), negative.sum()
        if not m or not n:
            return math.nan, math.nan
        true, false = positive.cumsum(), negative.cumsum()
        area = float((negative * (true - positive / 2)).sum() / (m * n))
        with np.errstate(invalid="ignore"):
            precision = np.nan_to_num(true / (true + false))
        return area, float((positive * precision).sum() / m)

    def _by_sklearn(self, rows: Ints, place: int) -> tuple[float, float]:
        from sklearn.metrics import average_precision_score, roc_auc_score

        is_it, score = self.holds[rows, place], self.shares[rows, place]
        if is_it.all() or not is_it.any():
            return math.nan, math.nan
        return float(roc_auc_score(is_it, score)), float(average_precision_score(is_it, score))


def of_one_label(name: str, right: int, answered: int, there: int) -> dict[str, float]:
    """Precision, recall and F1 of a label, as ``f1/LABEL``."""
    return {
        f"precision/{name}": ratio(right, answered),
        f"recall/{name}": ratio(right, there),
        f"f1/{name}": ratio(2 * right, there + answered) if there else math.nan,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class Classified(Labelled):
    """Records of one label each.

    Attributes
    ----------
    truth : int array [records]
        The label of each, as its place among the names.
    """

    truth: Ints

    @cached_property
    def answers(self) -> Ints:
        """The label that was answered."""
        found: Ints = self.shares.argmax(1)
        return found

    @cached_property
    def holds(self) -> Bools:
        """The one that is true."""
        found: Bools = self.truth[:, None] == np.arange(len(self.names))
        return found

    @cached_property
    def said(self) -> Bools:
        """The likeliest one."""
        found: Bools = self.answers[:, None] == np.arange(len(self.names))
        return found

    def confusion(self, rows: Ints) -> Ints:
        """Confusion matrix [labels, labels] of some rows, the truth along the first axis."""
        size = len(self.names)
        cells = np.bincount(self.truth[rows] * size + self.answers[rows], minlength=size * size)
        return cells.reshape(size, size).astype(np.int64)

    def together(self, rows: Ints) -> dict[str, float]:
        """Accuracy and macro-F1."""
        return dict(of_confusion(self.confusion(rows).astype(np.float64)))


@dataclass(frozen=True, kw_only=True, eq=False)
class SeveralHold(Labelled):
    """Records of any number of labels; one is answered where it is likelier to hold than not.

    Attributes
    ----------
    truth : bool array [records, labels]
        Which hold.
    """

    truth: Bools

    @property
    def holds(self) -> Bools:
        """Which hold."""
        return self.truth

    @cached_property
    def said(self) -> Bools:
        """Which are likelier to hold than not."""
        found: Bools = self.shares >= _HOLDS
        return found

    def together(self, rows: Ints) -> dict[str, float]:
        """Macro-F1 and micro-F1, and how many records have all of their labels right."""
        holds, said = self.holds[rows], self.said[rows]
        cells = [(one & two).sum(0) for one, two in ((said, holds), (~said, holds), (said, ~holds))]
        counts = np.vstack([np.stack(cells, axis=1), [len(rows), 0, 0]]).astype(np.float64)
        whole = (holds == said).all(1)
        return {**of_cells(counts), "exact_match": float(whole.mean()) if len(rows) else math.nan}

    def of(self, place: int) -> Classified:
        """One of the labels against its absence."""
        share, name = self.shares[:, place], self.names[place]
        return Classified(
            truth=self.truth[:, place].astype(np.int64),
            shares=np.stack([1.0 - share, share], axis=1),
            names=(f"not {name}", name),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimated(Observed):
    """Records of one number each.

    Attributes
    ----------
    truth, said : float array [records]
        What it is, and what was estimated.
    """

    truth: Floats
    said: Floats

    def measure(self, rows: Ints) -> Values:
        """MAE, RMSE, mean error, R squared, and Spearman's correlation by mean ranks."""
        truth, said = self.truth[rows], self.said[rows]
        errors, spread = said - truth, ((truth - truth.mean()) ** 2).sum()
        ranks = [_mean_ranks(codes[rows]) for codes in self._codes]
        return {
            "mae": float(np.abs(errors).mean()),
            "rmse": float(np.sqrt(np.square(errors).mean())),
            "mean_error": float(errors.mean()),
            "r2": float(1.0 - np.square(errors).sum() / spread) if spread > 0 else math.nan,
            "spearman": _correlation(*ranks),
        }

    @cached_property
    def _codes(self) -> tuple[Ints, Ints]:
        return (
            np.unique(self.truth, return_inverse=True)[1],
            np.unique(self.said, return_inverse=True)[1],
        )


def _mean_ranks(codes: Ints) -> Floats:
    """The rank of each record from 0 to 1, equal ones having their mean."""
    counts = np.bincount(codes)
    found: Floats = ((counts.cumsum() - counts / 2) / len(codes))[codes]
    return found


def _correlation(one: Floats, two: Floats) -> float:
    one, two = one - one.mean(), two - two.mean()
    spread = float(np.sqrt((one @ one) * (two @ two)))
    return float(one @ two) / spread if spread > 1e-12 else math.nan


@dataclass(frozen=True, kw_only=True, eq=False)
class CountedRecords(Observed):
    """Records of any other task: what its score counts of each.

    Attributes
    ----------
    counts : float array [records, ...]
        Of each record alone.
    plan : Plan
        Its task makes metrics of their sum.
    """

    counts: Floats
    plan: Plan

    def measure(self, rows: Ints) -> Values:
        """The metrics of the task."""
        return metrics_of(self.plan, self.counts[rows].sum(0))


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundEntities(CountedRecords):
    """Records whose text has entities: whole ones, with their label, are right."""

    def of_labels(self, rows: Ints) -> Ints:
        """Of each label the entities found rightly, found, and there: [3, labels]."""
        counts: Ints = self.counts[rows, :-1].sum(0).reshape(3, -1).astype(np.int64)
        return counts

    def measure(self, rows: Ints) -> Values:
        """The metrics of all entities together, then of each label as ``f1/LABEL``."""
        found = dict(super().measure(rows))
        for name, (right, answered, there) in zip(
            self.plan.model.labels, self.of_labels(rows).T, strict=True
        ):
            found |= of_one_label(name, right, answered, there)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Differences(Observed):
    """Two models on the same records: the figures of one less those of the other."""

    this: Observed
    other: Observed

    def measure(self, rows: Ints) -> Values:
        """The differences of the figures that both have."""
        one, two = self.this.measure(rows), self.other.measure(rows)
        return {name: value - two[name] for name, value in one.items() if name in two}


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are made.

    Attributes
    ----------
    draws, confidence : int, float
        How many, and which part of them is inside an interval.
    seed : int
        Makes the same draws again.
    advance : callable
        Told of every draw.
    """

    draws: int = 1000
    confidence: float = 0.95
    seed: int = 0
    advance: Callable[[int], None] = lambda draws: None

    def figures(self, observed: Observed, rows: Ints, unit_of: Ints) -> dict[str, Figure]:
        """Figures of the rows, with the intervals over the units that these are of."""
        point = observed.point(rows)
        _, units = np.unique(unit_of[rows], return_inverse=True)
        seen: dict[str, list[float]] = {name: [] for name in point}
        for drawn in self._draws(units):
            for name, value in observed.measure(rows[drawn]).items():
                seen[name].append(value)
        return {name: self._figure(value, np.array(seen[name])) for name, value in point.items()}

    def _draws(self, units: Ints) -> Iterator[Ints]:
        """Places of records, those of as many units as there are, drawn with replacement."""
        number = int(units.max()) + 1 if len(units) else 0
        if number < 2:
            return
        rng = np.random.default_rng(self.seed)
        order = np.argsort(units, kind="stable")
        sizes = np.bincount(units, minlength=number)
        ends = np.cumsum(sizes)
        for _ in range(self.draws):
            picked = rng.integers(0, number, number)
            lengths = sizes[picked]
            starts = np.repeat(ends[picked] - np.cumsum(lengths), lengths)
            yield order[starts + np.arange(lengths.sum())]
            self.advance(1)

    def _figure(self, value: float, seen: Floats) -> Figure:
        if math.isnan(value):
            return Figure(value=None)
        defined = seen[~np.isnan(seen)]
        if not len(seen) or len(defined) < (1 - _MOST_UNDEFINED) * len(seen):
            return Figure(value=value)
        outside = (1 - self.confidence) / 2
        low, high = np.quantile(defined, [outside, 1 - outside])
        return Figure(value=value, low=float(low), high=float(high))


def ratio(part: float, whole: float) -> float:
    """A share; NaN of nothing."""
    return float(part / whole) if whole else math.nan
