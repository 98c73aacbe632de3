"""Whether probabilities are frequencies, and the temperature that brings them nearer.

The expected calibration error and temperature scaling are those of Guo et al., "On calibration of modern
neural networks" (ICML 2017): records are put into bins of equal width by their probability; a bin's
error is the distance of its mean probability from how often it is so, and the error of all is the mean
over records. A temperature divides all logits: no answer changes, only how sure it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from silotune.inference.evaluated import Bin, Calibration
from silotune.models.prediction import Prediction
from silotune.models.task import LoadedModel, Task

BINS = 10
_RANGE = 3.0  # of the temperature's logarithm: 1/20 to 20

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def calibration_of(truth: Ints, shares: Floats, *, positive: int | None, of: str) -> Calibration:
    """How far the probabilities of records are frequencies.

    Parameters
    ----------
    truth : int array [records]
        The label of each.
    shares : float array [records, labels]
        Its probabilities.
    positive : int or None
        The label that is looked at; the answered one where there is none.
    of : str
        Its name.
    """
    if positive is None:
        probability, so = shares.max(1), shares.argmax(1) == truth
    else:
        probability, so = shares[:, positive], truth == positive
    place = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    bins, error = [], 0.0
    for number in range(BINS):
        inside = place == number
        records = int(inside.sum())
        mean = float(probability[inside].mean()) if records else None
        share = float(so[inside].mean()) if records else None
        if mean is not None and share is not None:
            error += records * abs(mean - share)
        bins.append(
            Bin(
                low=number / BINS,
                high=(number + 1) / BINS,
                records=records,
                probability=mean,
                share=share,
            )
        )
    hot = np.eye(shares.shape[1])[truth]
    return Calibration(
        of=of,
        bins=tuple(bins),
        ece=error / len(truth),
        brier=float(np.square(shares - hot).sum(1).mean()),
        log_loss=_log_loss(truth, np.log(np.maximum(shares, 1e-300))),
    )


def fitted_temperature(truth: Ints, shares: Floats) -> float:
    """The temperature with the least mean log loss on records [n] of probabilities [n, labels]."""
    logits = np.log(np.maximum(shares, 1e-30))
    found = minimize_scalar(
        lambda at: _log_loss(truth, logits / np.exp(at)), bounds=(-_RANGE, _RANGE), method="bounded"
    )
    return float(np.exp(found.x))


def tempered(shares: Floats, temperature: float) -> Floats:
    """Probabilities [n, labels] whose logits were divided by a temperature."""
    if temperature == 1.0:
        return shares
    logits = np.log(np.maximum(shares, 1e-300)) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    found: Floats = powers / powers.sum(1, keepdims=True)
    return found


class _Tempered:
    """A task whose probabilities are tempered; everything else is the task's own."""

    def __init__(self, task: Task, temperature: float) -> None:
        self._task, self._temperature = task, temperature

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def predict(
        self, model: LoadedModel, examples: Sequence[Mapping[str, str]]
    ) -> list[Prediction]:
        return [self._cooled(found) for found in self._task.predict(model, examples)]

    def _cooled(self, found: Prediction) -> Prediction:
        if not found.probabilities:
            return found
        shares = tempered(np.array([[*found.probabilities.values()]]), self._temperature)[0]
        named = dict(zip(found.probabilities, shares.tolist(), strict=True))
        return Prediction(output=found.output, probabilities=named)


def calibrated(model: LoadedModel, temperature: float) -> LoadedModel:
    """A model that answers as it did, with tempered probabilities."""
    return replace(model, task=cast(Task, _Tempered(model.task, temperature)))


def _log_loss(truth: Ints, logits: Floats) -> float:
    top = logits.max(1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return float((total - logits[np.arange(len(truth)), truth]).mean())
