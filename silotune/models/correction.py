"""Corrections of frozen weights: what some strategies add to ``W`` beside ``s B A``.

A correction lives in the base layer's weight itself, so that training, inference and per-sample
gradients see it without a word; the weight as it came is kept beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

Matrix = NDArray[np.float32]


class Correction:
    """The correction of one adapted layer, of shape ``[out, in]``.

    Parameters
    ----------
    weight : Tensor
        The frozen weight, changed in place.
    transposed : bool
        Whether it is kept as ``[in, out]`` (Conv1D).
    """

    def __init__(self, weight: Tensor, *, transposed: bool) -> None:
        self._weight, self._transposed = weight, transposed
        self._plain: Tensor | None = None  # kept from the first correction on
        rows, columns = weight.shape
        self.shape = (columns, rows) if transposed else (rows, columns)

    def write(self, values: Tensor) -> None:
        """Have the layer's weight be its own plus `values` [out, in]."""
        turned = values.t() if self._transposed else values
        if self._plain is None:
            self._plain = self._weight.detach().clone()
        with torch.no_grad():
            self._weight.copy_(self._plain + turned.to(self._plain))

    def read(self) -> Tensor:
        """The correction as it is, [out, in], up to the rounding of the weight."""
        plain = self._weight if self._plain is None else self._plain
        found = (self._weight - plain).detach()
        return found.t() if self._transposed else found


def corrections_of(peft: Any) -> dict[str, Correction]:
    """A correction for each LoRA layer, by the name it has in a layout."""
    return {
        f"{name}.correction": Correction(
            layer.get_base_layer().weight, transposed=bool(layer.fan_in_fan_out)
        )
        for name, layer in peft.named_modules()
        if isinstance(layer, LoraLayer)
    }


@contextmanager
def corrections_off(corrections: Mapping[str, Correction]) -> Iterator[None]:
    """The frozen weights as they came, for a while."""
    kept = {name: correction.read().clone() for name, correction in corrections.items()}
    try:
        for correction in corrections.values():
            correction.write(torch.zeros(correction.shape))
        yield
    finally:
        for name, values in kept.items():
            corrections[name].write(values)


def merged_factors(arrays: Mapping[str, Matrix], *, scale: float) -> tuple[dict[str, Matrix], int]:
    """LoRA matrices of scale 1 that add as much as adapter and correction together.

    Parameters
    ----------
    arrays : mapping of name to array
        A, B and correction of every adapted layer, by their names in a layout.
    scale : float
        Of the adapter: alpha / r.

    Returns
    -------
    matrices : dict of name to float32 array
        A [rank, in] and B [out, rank], by the same names.
    rank : int
        The largest that any layer needs to float32's precision, at least 1; others are padded.
    """
    factors = {}
    for name, correction in arrays.items():
        if not name.endswith(".correction"):
            continue
        stem = name.removesuffix(".correction")
        A, B = arrays[f"{stem}.lora_A.weight"], arrays[f"{stem}.lora_B.weight"]
        whole = correction.astype(np.float64) + scale * (B.astype(np.float64) @ A)
        U, S, Vt = np.linalg.svd(whole, full_matrices=False)
        needed = int((np.finfo(np.float32).eps * S[0] < S).sum())
        root = np.sqrt(S)
        factors[stem] = (U * root, root[:, None] * Vt, needed)
    rank = max(1, *(needed for _, _, needed in factors.values()))
    matrices = {}
    for stem, (left, right, _) in factors.items():
        kept = min(rank, left.shape[1])
        b = np.zeros((left.shape[0], rank), dtype=np.float32)
        a = np.zeros((rank, right.shape[1]), dtype=np.float32)
        b[:, :kept], a[:kept] = left[:, :kept], right[:kept]
        matrices[f"{stem}.lora_A.weight"], matrices[f"{stem}.lora_B.weight"] = a, b
    return matrices, rank
