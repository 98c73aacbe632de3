"""From which probability on a record counts as positive: chosen on some records, for others."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from silotune.inference.figures import Bools, Floats, Ints, Observed, Values, ratio

_WANTED = re.compile(r"(sensitivity|specificity)=(0?\.\d+|1(?:\.0)?)")


@dataclass(frozen=True)
class ThresholdRule:
    """How a threshold is chosen: ``max-f1``, ``sensitivity=0.95`` or ``specificity=0.9``."""

    what: str
    wanted: float = math.nan

    @classmethod
    def parse(cls, text: str) -> ThresholdRule:
        """Read one. Raises `ValueError`."""
        if text == "max-f1":
            return cls("max-f1")
        match = _WANTED.fullmatch(text)
        if match is None:
            raise ValueError("is max-f1, sensitivity=SHARE or specificity=SHARE, such as 0.95")
        return cls(match[1], float(match[2]))

    def __str__(self) -> str:
        return self.what if math.isnan(self.wanted) else f"{self.what}={self.wanted:g}"

    @property
    def words(self) -> str:
        """The rule as a sentence's end."""
        return {
            "max-f1": "the one with the highest F1",
            "sensitivity": f"the highest one with a sensitivity of at least {self.wanted:g}",
            "specificity": f"the lowest one with a specificity of at least {self.wanted:g}",
        }[self.what]

    def choose(self, positive: Bools, scores: Floats) -> float | None:
        """The threshold on records [n]; None where none does it: also if all have the label, or none.

        Candidates are the scores that occur; of several with the highest F1 it is the highest.
        """
        from sklearn.metrics import roc_curve

        if positive.all() or not positive.any():
            return None
        fpr, tpr, thresholds = roc_curve(positive, scores, drop_intermediate=False)
        fpr, tpr, thresholds = fpr[1:], tpr[1:], thresholds[1:]  # the first is infinite
        if self.what == "sensitivity":
            return float(thresholds[np.flatnonzero(tpr >= self.wanted - 1e-12)[0]])
        if self.what == "specificity":
            kept = np.flatnonzero(1 - fpr >= self.wanted - 1e-12)
            return float(thresholds[kept[-1]]) if len(kept) else None
        true, false = tpr * positive.sum(), fpr * (~positive).sum()
        return float(thresholds[np.argmax(2 * true / (true + false + positive.sum()))])


MAX_F1 = ThresholdRule("max-f1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Decided(Observed):
    """Records that count as positive from a threshold on."""

    positive: Bools
    scores: Floats
    threshold: float

    def measure(self, rows: Ints) -> Values:
        """Sensitivity, specificity, precision, negative predictive value, F1 and accuracy."""
        truth, said = self.positive[rows], self.scores[rows] >= self.threshold
        tp, tn = int((truth & said).sum()), int((~truth & ~said).sum())
        fp, fn = int((~truth & said).sum()), int((truth & ~said).sum())
        return {
            "sensitivity": ratio(tp, tp + fn),
            "specificity": ratio(tn, tn + fp),
            "precision": ratio(tp, tp + fp),
            "negative_predictive_value": ratio(tn, tn + fn),
            "f1": ratio(2 * tp, 2 * tp + fp + fn),
            "accuracy": ratio(tp + tn, len(rows)),
        }
