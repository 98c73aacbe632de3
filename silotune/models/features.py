"""Features of the frozen base model, computed once: a head on them trains in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from silotune.models.base import LoadedModel, TaskModel
from silotune.models.batching import batches
from silotune.models.task import Encoded


def compute_features(model: LoadedModel, encoded: Encoded, *, batch: int = 64) -> Tensor:
    """Features of every example as the base model alone gives them.

    Whatever the adapter holds has no effect, and is as before afterwards.

    Parameters
    ----------
    model : LoadedModel
        A model with a head.
    encoded : Encoded
        Examples encoded by the model's task.
    batch : int
        Most examples a forward pass takes.

    Returns
    -------
    Tensor
        Float32 of shape [len(encoded), hidden], on the CPU, in the order of `encoded`: normalised,
        centred and scaled, as the head expects them.
    """
    module = model.module
    found = torch.empty(len(encoded), module.centre.numel())
    with module.inference(), _adapter_off(module):
        for rows in batches(encoded, range(len(encoded)), size=batch):
            features = module.features(encoded.padded(rows, model.device))
            found[rows] = features.cpu()
    return found


@contextmanager
def _adapter_off(module: TaskModel) -> Iterator[None]:
    """Zero the B matrices for a while: the adapter then adds exactly nothing.

    PEFT's own switch would set ``requires_grad`` of frozen A matrices, and would not reach layers
    whose forward the privacy engine has replaced.
    """
    matrices = [p for name, p in module.peft.named_parameters() if ".lora_B." in name]
    kept = [matrix.detach().clone() for matrix in matrices]
    try:
        with torch.no_grad():
            for matrix in matrices:
                matrix.zero_()
        yield
    finally:
        with torch.no_grad():
            for matrix, values in zip(matrices, kept, strict=True):
                matrix.copy_(values)
