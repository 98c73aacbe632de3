"""Evaluation on a site's validation units: counts that leave only with noise, or not at all.

Each validation unit adds one record to the counts, so that a unit moves them by a known amount: one
cell of a confusion matrix, or one capped loss and one to the number of texts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from silotune.models.base import LoadedModel
from silotune.models.batching import batches
from silotune.models.task import Encoded
from silotune.privacy.noise import NoiseSource

_BATCH = 128
_LOSS_CAP = 10.0


def sensitivity(model: LoadedModel) -> float:
    """L2 norm of the most that one unit can add to `counts`."""
    return 1.0 if model.task.has_head else math.sqrt(_LOSS_CAP**2 + 1.0)


def counts(
    model: LoadedModel, encoded: Encoded, *, rows: NDArray[np.int64], units: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Summed counts over the first record of each unit.

    Parameters
    ----------
    model : LoadedModel
        With the adapter to be measured written into it.
    encoded : Encoded
        The site's records.
    rows : int array
        Validation records.
    units : int array
        The unit of each of `rows`.

    Returns
    -------
    float64 array
        Classification: confusion matrix [labels, labels]. Causal LM: [sum of capped losses, texts].
    """
    _, first = np.unique(units, return_index=True)
    chosen = rows[np.sort(first)]
    labels = len(model.plan.model.labels)
    total = np.zeros((labels, labels) if model.task.has_head else 2)
    for batch in batches(encoded, chosen, size=_BATCH):
        total += _batch_counts(model, model.task.collate(encoded, batch, model.device))
    return total


def _batch_counts(model: LoadedModel, inputs: Any) -> NDArray[np.float64]:
    if model.task.has_head:
        return model.task.score(model.module, inputs)
    with model.module.inference():
        losses = model.task.losses(model.module, inputs).clamp(0.0, _LOSS_CAP)
    return np.array([float(losses.double().sum()), len(losses)])


def noisy(
    values: NDArray[np.float64], *, sigma: float, sensitivity: float, noise: NoiseSource
) -> NDArray[np.float32]:
    """Counts with Gaussian noise of standard deviation sigma times sensitivity."""
    sums = torch.tensor(values, dtype=torch.float32)
    return np.asarray(noise.add(sums, sigma * sensitivity).numpy(), dtype=np.float32)
