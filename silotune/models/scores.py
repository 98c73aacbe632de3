"""Metrics from additive counts: what the coordinator needs of a task, without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from silotune.plan.sections import Sections

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
    return metrics(counts)


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


_KINDS: Mapping[str, tuple[Callable[[Counts], dict[str, float]], Callable[[Counts], float]]] = {
    "confusion": (of_confusion, lambda counts: float(counts.sum())),
    "entities": (of_entities, lambda counts: float(counts[-1])),
    "losses": (of_losses, lambda counts: float(counts[1])),
}
"""By what `TaskFacts.counts` says: metrics of counts, and the number of records."""
