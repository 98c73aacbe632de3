"""Counting on a site's validation units: `silotune.client.evaluation` says what may come of it."""

from __future__ import annotations

import logging
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from silotune.client.evaluation import nothing
from silotune.models.batching import Encoded, batches
from silotune.models.task import LoadedModel
from silotune.plan.tasks import LOSS_CAP

_log = logging.getLogger(__name__)


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
        Of the shape that the task's counts have.
    """
    _, first = np.unique(units, return_index=True)
    chosen = rows[np.sort(first)]
    total = nothing(model.plan)
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


def _batch_counts(model: LoadedModel, encoded: Encoded, rows: list[int]) -> NDArray[np.float64]:
    inputs = model.task.collate(encoded, rows, model.device)
    return model.task.score(model.module, inputs, cap=LOSS_CAP)
