"""What the frozen base model makes of every record, computed once instead of once a step.

A head on the features that come out of it trains in seconds. With ``lora.last_layers`` nothing below
the first adapted layer ever changes, so what that layer is given for a record is a constant: it is kept
in memory, unpadded, and put in place of the lower layers' work. The numbers are the same, to the
rounding of another batch's padding, for about half the time. A language model has no features; what
lies below its adapter is kept where a run uses it often enough (`silotune.client.trainer`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from silotune.models.batching import Batch, Encoded, Rows, batches
from silotune.models.pretrained import width_of
from silotune.models.task import LoadedModel, TaskModel

_MOST_BYTES = 2**30  # of one site's records; more are not kept


class PrefixCache:
    """Hidden states of a site's records at the first trained layer, unpadded.

    Parameters
    ----------
    encoded : Encoded
        The records.
    size : int
        Width of the hidden states.
    tokens : Tensor, optional
        The states [tokens, size], if they are known already.
    """

    def __init__(self, encoded: Encoded, *, size: int, tokens: Tensor | None = None) -> None:
        self._encoded = encoded
        self._offsets, self._lengths = encoded.offsets, np.diff(encoded.offsets)
        shape = (int(self._offsets[-1]), size)
        self.tokens = torch.empty(shape) if tokens is None else tokens
        if self.tokens.shape != shape:
            raise ValueError(f"expected states of shape {shape}, got {tuple(self.tokens.shape)}")

    @classmethod
    def joined(cls, encoded: Encoded, parts: Sequence[PrefixCache]) -> PrefixCache:
        """One cache of several, for the records of all of them one after the other."""
        tokens = torch.cat([part.tokens for part in parts])
        return cls(encoded, size=tokens.shape[1], tokens=tokens)

    @staticmethod
    def fits(encoded: Encoded, *, size: int) -> bool:
        """Whether the records' hidden states are few enough to be kept."""
        return int(encoded.offsets[-1]) * size * 4 <= _MOST_BYTES

    def put(self, rows: Rows, hidden: Tensor) -> None:
        """Keep the hidden states [sequences, longest, size] of some records, padded right."""
        for place, states in zip(self._encoded.places(rows), hidden.float().cpu(), strict=True):
            start, length = int(self._offsets[place]), int(self._lengths[place])
            self.tokens[start : start + length] = states[:length]

    def get(self, rows: Rows, device: torch.device) -> Tensor:
        """Hidden states [sequences, longest, size] of some records, zero where padded."""
        chosen = self._encoded.places(rows)
        lengths = self._lengths[chosen]
        columns = np.arange(int(lengths.max(initial=0)))[None, :]
        real = torch.from_numpy(columns < lengths[:, None])
        places = torch.from_numpy((self._offsets[chosen][:, None] + columns)[real.numpy()])
        padded = torch.zeros(*real.shape, self.tokens.shape[1])
        padded[real] = self.tokens[places]
        return padded.to(device)


@dataclass(frozen=True)
class Frozen:
    """What the frozen base model makes of every record, computed once.

    Attributes
    ----------
    features : Tensor
        Float32 of shape [records, hidden], on the CPU, in the order of the records: normalised,
        centred and scaled, as the head expects them. Where it sees each token, [tokens, hidden];
        without a head [records, 0].
    prefix : PrefixCache or None
        Hidden states at the first trained layer, where there are frozen layers below it.
    """

    features: Tensor
    prefix: PrefixCache | None

    @classmethod
    def joined(cls, encoded: Encoded, parts: Sequence[Frozen]) -> Frozen:
        """What several sites' records have together; `encoded` holds them in the same order."""
        caches = [part.prefix for part in parts if part.prefix is not None]
        prefix = PrefixCache.joined(encoded, caches) if len(caches) == len(parts) else None
        return cls(torch.cat([part.features for part in parts]), prefix)

    def save(self, path: Path) -> None:
        """Write to a safetensors file, in one step: for other processes of a simulation."""
        tensors = {"features": self.features}
        if self.prefix is not None:
            tensors["prefix"] = self.prefix.tokens
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(tensors, part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path, encoded: Encoded) -> Frozen:
        """Read what `save` wrote of these records; the file is mapped, not copied."""
        tensors = load_file(path)
        features, tokens = tensors["features"], tensors.get("prefix")
        if tokens is None:
            return cls(features, None)
        return cls(features, PrefixCache(encoded, size=tokens.shape[1], tokens=tokens))

    def seen(self, encoded: Encoded, rows: Rows, device: torch.device) -> Tensor:
        """What the head sees of some records: [n, hidden], or [sequences, longest, hidden]."""
        if encoded.first is None:
            return self.features[np.asarray(rows, dtype=np.int64)].to(device)
        cache = PrefixCache(encoded, size=self.features.shape[1], tokens=self.features)
        return cache.get(rows, device)

    def inputs(self, model: LoadedModel, encoded: Encoded, rows: Rows) -> dict[str, Tensor]:
        """The task's batch of some records, with the prefix where it is kept."""
        batch = model.task.collate(encoded, rows, model.device)
        if self.prefix is not None:
            batch["prefix"] = self.prefix.get(rows, model.device)
        return batch


def compute_frozen(model: LoadedModel, encoded: Encoded, *, batch: int = 64) -> Frozen:
    """Run the base model alone over every record, once.

    Whatever the adapter holds has no effect, and is as before afterwards.

    Parameters
    ----------
    model : LoadedModel
        The model.
    encoded : Encoded
        Examples encoded by the model's task.
    batch : int
        Most examples a forward pass takes; of a language model as many as the plan says.

    """
    module, prefix = model.module, model.module.prefix
    if module.head is None:
        return Frozen(torch.empty(len(encoded), 0), _states_below(model, encoded))
    size = module.centre.numel()
    kept = prefix is not None and PrefixCache.fits(encoded, size=size)
    cache = PrefixCache(encoded, size=size) if kept else None

    def inputs(rows: Rows) -> Batch:
        return encoded.padded(rows, model.device)

    with _adapter_off(module):
        if prefix is None or cache is None:
            return Frozen(features_of(model, encoded, inputs, batch=batch), None)
        with prefix.capture() as seen:

            def keep(rows: Rows) -> None:
                cache.put(rows, seen.pop())

            return Frozen(features_of(model, encoded, inputs, batch=batch, each=keep), cache)


def _states_below(model: LoadedModel, encoded: Encoded) -> PrefixCache | None:
    """What the first trained layer of a language model is given for each record."""
    module, prefix = model.module, model.module.prefix
    size = width_of(module.backbone.config)
    if prefix is None or size is None or not PrefixCache.fits(encoded, size=size):
        return None
    cache = PrefixCache(encoded, size=size)
    with module.inference(), prefix.capture() as seen:
        most = model.plan.privacy.max_physical_batch
        for rows in batches(encoded, range(len(encoded)), size=most):
            batch = encoded.padded(rows, model.device)
            # Without the output layer, whose logits nobody wants.
            module.backbone.base_model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )
            cache.put(rows, seen.pop())
    return cache


def features_of(
    model: LoadedModel,
    encoded: Encoded,
    inputs: Callable[[Rows], Batch],
    *,
    batch: int,
    each: Callable[[Rows], None] = lambda rows: None,
) -> Tensor:
    """Features of every record as `Frozen` keeps them, by the model as it is.

    Parameters
    ----------
    model : LoadedModel
        With a head.
    encoded : Encoded
        The records.
    inputs : callable
        Gives the model's batch of some of them.
    batch : int
        Most sequences of a forward pass.
    each : callable
        Told the rows after each forward pass.
    """
    module, size = model.module, model.module.centre.numel()
    tokens = None if encoded.first is None else PrefixCache(encoded, size=size)
    found = torch.empty(len(encoded), size) if tokens is None else tokens.tokens
    with module.inference():
        for rows in batches(encoded, range(len(encoded)), size=batch):
            features = module.features(inputs(rows)).cpu()
            if tokens is None:
                found[rows] = features
            else:
                tokens.put(rows, features)
            each(rows)
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
