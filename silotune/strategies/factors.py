"""LoRA's two matrices of each adapted layer, as views of a flat vector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silotune.models.layout import Layout

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """One adapted layer.

    Attributes
    ----------
    name : str
        Of A, as in the layout.
    A : float32 array [r, in]
    B : float32 array [out, r]
    """

    name: str
    A: Matrix
    B: Matrix


def pairs(layout: Layout, flat: NDArray[np.float32]) -> Iterator[Pair]:
    """The adapted layers in the order of the layout; their matrices are views of `flat`."""
    views = layout.unpack(flat)
    for name, A in views.items():
        if ".lora_A." in name:
            stem, leaf = name.split(".lora_A.")
            yield Pair(name, A, views[f"{stem}.lora_B.{leaf}"])
