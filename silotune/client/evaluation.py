"""Evaluation on a site's validation units: counts that leave only with noise, or not at all.

Each validation unit adds one record to the counts, so that a unit moves them by a known amount: one
cell of a confusion matrix, or one capped loss and one to the number of texts.
"""

from __future__ import annotations

import logging
import math
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from silotune.models.batching import Encoded, batches
from silotune.models.task import LoadedModel
from silotune.privacy.noise import NoiseSource

_log = logging.getLogger(__name__)

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
    total = nothing(model)
    for batch in batches(encoded, chosen, size=model.plan.privacy.max_physical_batch):
        try:
            total += _batch_counts(model, encoded, batch)
        except Exception:
            if not model.plan.private:
                raise
            # What it is about one record, nobody may learn: alone, it counts as nothing.
            _log.exception("%d records could not be scored together", len(batch))
            for row in batch:
                with suppress(Exception):
                    total += _batch_counts(model, encoded, [row])
    return total


def nothing(model: LoadedModel) -> NDArray[np.float64]:
    """Counts of no unit at all."""
    labels = len(model.plan.model.labels)
    return np.zeros((labels, labels) if model.task.has_head else 2)


def _batch_counts(model: LoadedModel, encoded: Encoded, rows: list[int]) -> NDArray[np.float64]:
    inputs = model.task.collate(encoded, rows, model.device)
    return model.task.score(model.module, inputs, cap=_LOSS_CAP)


def noisy(
    values: NDArray[np.float64], *, sigma: float, sensitivity: float, noise: NoiseSource
) -> NDArray[np.float32]:
    """Counts with Gaussian noise of standard deviation sigma times sensitivity."""
    sums = torch.tensor(values, dtype=torch.float32)
    return np.asarray(noise.add(sums, sigma * sensitivity).numpy(), dtype=np.float32)
