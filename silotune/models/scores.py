"""Metrics from additive counts: what the coordinator needs of a task, without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from silotune.plan.sections import Sections, TargetSection
from silotune.plan.tasks import SUMS_OF_ERRORS

Counts = NDArray[np.float64]

_LARGEST_LOSS = 700.0  # e**709 is the largest float


def metrics_of(plan: Sections, counts: Counts) -> dict[str, float]:
    """Metrics of a plan's task from the sum of counts.

    Parameters
    ----------
    plan : Sections
        Its task says what the counts are.
    counts : float64 array
        As the task's ``score`` returns, summed over any number of sites.
    """
    metrics, _ = _KINDS[plan.task.counts]
    return metrics(counts, plan)


def records_in(plan: Sections, counts: Counts) -> int:
    """How many records are behind counts."""
    _, records = _KINDS[plan.task.counts]
    return int(records(counts))


def of_confusion(counts: Counts) -> dict[str, float]:
    """Accuracy and macro-F1 of a confusion matrix (rows are the truth).

    Macro-F1 is the mean of F1 over the labels that occur as truth: one set for all models that are
    scored on the same records. A label that is only ever predicted costs precision and recall of the
    others, and has no F1 of its own. Accuracy is also micro-F1, each text having one label. Negative
    counts, which noise can make, count as zero. Without any example both are NaN.
    """
    counts = np.maximum(np.asarray(counts, dtype=np.float64), 0.0)
    true, predicted, right = counts.sum(1), counts.sum(0), np.diag(counts)
    seen = true > 0
    if not seen.any():
        return {"accuracy": float("nan"), "macro_f1": float("nan")}
    f1 = 2.0 * right[seen] / (true + predicted)[seen]
    return {"accuracy": float(right.sum() / counts.sum()), "macro_f1": float(f1.mean())}


def recall_of(counts: Counts) -> list[float | None]:
    """Share of each label's records that were found, in the labels' order; None where it has none."""
    counts = np.maximum(np.asarray(counts, dtype=np.float64), 0.0)
    true, right = counts.sum(1), np.diag(counts)
    return [float(r / t) if t > 0 else None for r, t in zip(right, true, strict=True)]


def constant(counts: Counts, label: int) -> Counts:
    """The confusion matrix of always answering one label, on the records behind another matrix."""
    found = np.zeros_like(np.asarray(counts, dtype=np.float64))
    found[:, label] = np.asarray(counts).sum(1)
    return found


def of_entities(counts: Counts) -> dict[str, float]:
    """F1, recall and precision of all entities together, whole ones only.

    Parameters
    ----------
    counts : float64 array [3 labels + 1]
        Of each label the entities found rightly, then all that were found, then all that are there; at
        last the records. Negative counts, which noise can make, count as zero.

    Without any entity that is there all are NaN.
    """
    right, found, there = np.maximum(counts[:-1], 0.0).reshape(3, -1).sum(1).tolist()

    def share(part: float, whole: float) -> float:
        if there == 0:
            return math.nan
        return min(1.0, part / whole) if whole > 0 else 0.0

    return {
        "entity_f1": share(2.0 * right, found + there),
        "entity_recall": share(right, there),
        "entity_precision": share(right, found),
    }


def of_losses(counts: Counts) -> dict[str, float]:
    """Mean loss a sequence, and its exponential, of [sum of losses, sequences].

    Without any sequence both are NaN.
    """
    total, number = float(counts[0]), float(counts[1])
    loss = total / number if number > 0 else math.nan
    return {"loss": loss, "perplexity": math.exp(min(loss, _LARGEST_LOSS))}


def of_cells(counts: Counts) -> dict[str, float]:
    """Macro-F1 and micro-F1 of records with several labels.

    Parameters
    ----------
    counts : float64 array [labels + 1, 3]
        Of each label the records that are found, missed and falsely found; the last row begins with
        the number of records.

    Returns
    -------
    dict
        Macro-F1 is the mean of F1 over the labels that occur, as in `of_confusion`; micro-F1 is F1 of
        all pairs of a record and a label together. Both are NaN where no label occurs.
    """
    found, missed, false = np.maximum(np.asarray(counts, dtype=np.float64)[:-1], 0.0).T
    seen = found + missed > 0
    if not seen.any():
        return {"macro_f1": math.nan, "micro_f1": math.nan}
    f1 = 2.0 * found[seen] / (2.0 * found + missed + false)[seen]
    total = 2.0 * found.sum() + missed.sum() + false.sum()
    return {"macro_f1": float(f1.mean()), "micro_f1": float(2.0 * found.sum() / total)}


def every_label(counts: Counts) -> Counts:
    """Counts of answering every label always, on the records behind other counts."""
    counts = np.asarray(counts, dtype=np.float64)
    true = counts[:-1, 0] + counts[:-1, 1]
    columns = np.stack([true, np.zeros_like(true), counts[-1, 0] - true], axis=1)
    return np.concatenate([columns, counts[-1:]])


def of_errors(counts: Counts, target: TargetSection) -> dict[str, float]:
    """Mean absolute error, R squared and Spearman's rank correlation of numbers.

    Parameters
    ----------
    counts : float64 array [5 + bins * bins]
        Of places in the plan's range, from 0 to 1: the number of records; the sums of absolute errors
        and of squared ones; the sums of the true places and of their squares. Then, row after row, how
        many records are in which bin by their true value (rows) and by their answer (columns).
    target : TargetSection
        The range and its bins.

    Returns
    -------
    dict
        MAE in the units of the range. R squared is of the records that were counted: always answering
        their mean has 0. Spearman's correlation is one of bins, whose records share their mean rank: it
        adds up over sites, and nobody need see two records beside each other. NaN where there is no
        record, or all have one value.
    """
    counts = np.asarray(counts, dtype=np.float64)
    number, absolute, squared, total, squares = np.maximum(counts[:SUMS_OF_ERRORS], 0.0)
    if number <= 0:
        return {"mae": math.nan, "r2": math.nan, "spearman": math.nan}
    spread = squares - total**2 / number
    return {
        "mae": float(absolute / number * (target.upper - target.lower)),
        "r2": float(1.0 - squared / spread) if spread > 1e-9 * number else math.nan,
        "spearman": _rank_correlation(counts[SUMS_OF_ERRORS:]),
    }


def mean_logit(counts: Counts) -> float:
    """The logit that answers the mean of the numbers behind the counts of a regression."""
    place = float(counts[3] / max(float(counts[0]), 1.0))
    place = min(max(place, 1e-6), 1.0 - 1e-6)
    return math.log(place / (1.0 - place))


def _rank_correlation(cells: Counts) -> float:
    """Spearman's correlation of a table of bins, by mean ranks. Noise may have made cells negative.

    The covariance is linear in the cells, so what noise there is in many empty ones averages out.
    """
    size = math.isqrt(len(cells))
    table = cells.reshape(size, size)
    ranks, spreads = [], []
    for margin in (table.sum(1), table.sum(0)):
        shares = np.maximum(margin, 0.0)
        shares = shares / max(float(shares.sum()), 1e-12)
        centred = np.cumsum(shares) - shares / 2.0 - 0.5
        ranks.append(centred)
        spreads.append(float(shares @ centred**2))
    everything = float(table.sum())
    if everything <= 0 or min(spreads) <= 0:
        return math.nan
    found = float(ranks[0] @ table @ ranks[1]) / everything / math.sqrt(spreads[0] * spreads[1])
    return min(max(found, -1.0), 1.0)


def found_shares(plan: Sections, counts: Counts) -> list[float | None] | None:
    """Share of each label's records that were found, in the labels' order; None without labels."""
    if plan.task.counts == "confusion":
        return recall_of(counts)
    if plan.task.counts != "cells":
        return None
    found, missed, _ = np.maximum(np.asarray(counts, dtype=np.float64)[:-1], 0.0).T
    return [float(f / (f + m)) if f + m > 0 else None for f, m in zip(found, missed, strict=True)]


def label_shares(plan: Sections, counts: Counts) -> list[float] | None:
    """Share of the records that have each label, in the labels' order; None without labels."""
    counts, number = np.asarray(counts, dtype=np.float64), records_in(plan, counts)
    if plan.task.counts not in {"confusion", "cells"}:
        return None
    true = counts.sum(1) if plan.task.counts == "confusion" else counts[:-1, :2].sum(1)
    return [float(share) for share in true / max(1, number)]


def _target(plan: Sections) -> TargetSection:
    assert plan.model.target is not None  # validated
    return plan.model.target


_Metrics = Callable[[Counts, Sections], dict[str, float]]
_KINDS: Mapping[str, tuple[_Metrics, Callable[[Counts], float]]] = {
    "confusion": (lambda counts, plan: of_confusion(counts), lambda counts: float(counts.sum())),
    "cells": (lambda counts, plan: of_cells(counts), lambda counts: float(counts[-1, 0])),
    "errors": (
        lambda counts, plan: of_errors(counts, _target(plan)),
        lambda counts: float(counts[0]),
    ),
    "losses": (lambda counts, plan: of_losses(counts), lambda counts: float(counts[1])),
    "entities": (lambda counts, plan: of_entities(counts), lambda counts: float(counts[-1])),
}
"""By what `TaskFacts.counts` says: metrics of counts, and the number of records."""
