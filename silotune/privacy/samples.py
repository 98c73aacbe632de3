"""Per-sample gradients: how they are kept on parameters, measured, and added up to those of units.

A parameter's ``grad_sample`` has shape ``[n, *parameter.shape]`` and type float32 (Opacus'
convention). That of a LoRA B is stored transposed, because the product is faster that way; `as_rows`
and `shaped_as` hide it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from silotune.errors import SelfCheckFailed

# Columns that are turned into float64 at a time: they stay in the cache, and are never all there.
_COLUMNS = 8192


class GradientSink:
    """Where the layers' functions put the gradients of trained parameters.

    Parameters
    ----------
    private : bool
        Keep one gradient a sample in ``p.grad_sample`` instead of their sum in ``p.grad``.
    """

    def __init__(self, *, private: bool) -> None:
        self.private = private

    def add(self, parameter: nn.Parameter, samples: Tensor) -> None:
        """Add the gradients of one use of a parameter in the current backward pass.

        Parameters
        ----------
        parameter : nn.Parameter
        samples : Tensor
            One gradient a sample, shape ``[n, *parameter.shape]``, any floating type.

        Raises
        ------
        SelfCheckFailed
            Earlier gradients of the parameter were already used in a step, or have another batch.
        """
        holder = cast(Any, parameter)
        earlier = getattr(holder, "grad_sample", None)
        if earlier is None:
            samples = samples.float()
            # Now they are in the cache. The norms live and die with this very tensor.
            cast(Any, samples).sample_norms = row_norms(as_rows(samples))
            holder.grad_sample = samples
        elif hasattr(earlier, "_processed") or earlier.shape != samples.shape:
            raise SelfCheckFailed("per-sample gradients of an earlier batch were not cleared")
        else:
            holder.grad_sample = earlier + samples


def _is_transposed(samples: Tensor) -> bool:
    return samples.dim() == 3 and not samples.is_contiguous() and samples.mT.is_contiguous()


def as_rows(samples: Tensor) -> Tensor:
    """Per-sample gradients ``[n, ...]`` as ``[n, size]``, in the order in which they are stored."""
    return (samples.mT if _is_transposed(samples) else samples).flatten(1)


def shaped_as(parameter: nn.Parameter, row: Tensor, *, samples: Tensor) -> Tensor:
    """A combination of the rows of `samples`, shape ``[size]``, in the parameter's shape."""
    if _is_transposed(samples):
        return row.view(parameter.shape[::-1]).t()
    return row.view(parameter.shape)


def row_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row of ``[n, size]``, float64 of shape ``[n]``.

    Squares are added up in float64, in parts of 8192 columns: whatever structure a row has (equal
    numbers, an outer product), its norm is wrong by less than ``(8192 + size / 8192) 2^-53``. In
    float32 equal numbers are all rounded the same way, and 60,000 of them lose 5e-5 of a norm.
    """
    return _combined([torch.linalg.vector_norm(part.double(), dim=1) for part in _columns(rows)])


def unit_norms(samples: list[Tensor], units: Tensor | None, n_units: int) -> Tensor:
    """L2 norm of each unit's gradient over all tensors.

    Parameters
    ----------
    samples : list[Tensor]
        ``grad_sample`` of each parameter of a group.
    units : Tensor or None
        Unit of each sequence, int64 ``[n]``; None if each sequence is a unit.
    n_units : int

    Returns
    -------
    Tensor
        Float64, shape ``[n_units]``, or ``[n]`` without units.
    """
    if units is None:
        known = [getattr(s, "sample_norms", None) for s in samples]
        found = zip(samples, known, strict=True)
        return _combined([row_norms(as_rows(s)) if k is None else k for s, k in found])
    parts = [part for sample in samples for part in _columns(as_rows(sample))]
    sums = (part.new_zeros(n_units, part.shape[1], dtype=torch.float64) for part in parts)
    return _combined(
        [
            torch.linalg.vector_norm(total.index_add_(0, units, part.double()), dim=1)
            for total, part in zip(sums, parts, strict=True)
        ]
    )


def weighted_sum(rows: Tensor, weights: Tensor, usable: Tensor | None) -> Tensor:
    """Rows of ``[n, size]`` times their weights, added up: float64 of shape ``[size]``.

    Parameters
    ----------
    rows : Tensor
        Float32.
    weights : Tensor
        Float64, ``[n]``.
    usable : Tensor or None
        Bool ``[n]``: rows that are not are left out, whatever they hold; None if all are.
    """
    parts = _columns(rows)
    if usable is not None:
        weights, parts = weights[usable], [part[usable] for part in parts]
    return torch.cat([weights @ part.double() for part in parts])


def _columns(rows: Tensor) -> list[Tensor]:
    return list(torch.split(rows, _COLUMNS, dim=1))


def _combined(norms: list[Tensor]) -> Tensor:
    """Norms of whole rows from the norms ``[n]`` of their parts."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms, 1), dim=1)
