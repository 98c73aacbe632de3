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

# torch adds up squares one after the other: longer rows would lose more digits than clipping allows.
_LONGEST_NORM = 8192


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
    """L2 norm of each row of ``[n, size]``, shape ``[n]``, to about 3e-7 in float32."""
    parts = [
        torch.linalg.vector_norm(part, dim=1) for part in torch.split(rows, _LONGEST_NORM, dim=1)
    ]
    return parts[0] if len(parts) == 1 else combined(parts)


def combined(norms: list[Tensor]) -> Tensor:
    """Norms of whole rows from the norms ``[n]`` of their parts."""
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms, dim=1), dim=1)
    return whole


def unit_sums(rows: Tensor, units: Tensor, n_units: int) -> Tensor:
    """Gradients ``[n, size]`` of sequences added up to those of their units, ``[n_units, size]``."""
    return rows.new_zeros(n_units, rows.shape[1]).index_add_(0, units, rows)


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
        Float32, shape ``[n_units]``, or ``[n]`` without units.
    """
    if units is not None:
        return combined([row_norms(unit_sums(as_rows(s), units, n_units)) for s in samples])
    known = [getattr(s, "sample_norms", None) for s in samples]
    return combined(
        [row_norms(as_rows(s)) if k is None else k for s, k in zip(samples, known, strict=True)]
    )
