"""Autograd functions that leave per-sample gradients behind in the one backward pass.

Each function computes the output of a linear layer and, in its backward, the gradients of the layer's
own trainable parameters. Under privacy these go to ``p.grad_sample`` (float32, shape ``[n, *p.shape]``,
the first dimension of the layer's input being the batch) and autograd is told that the parameter has
no gradient, so no ordinary ``p.grad`` is ever computed. Without privacy they are ordinary gradients.

A LoRA layer (Hu et al., 2022) is run *merged*: ``y = x (W + s B A)^T + b`` has the cost of the frozen
layer alone, and the low-rank products appear only where they are cheap, in the gradients
``dB = s dy^T (x A^T)`` and ``dA = s (dy B)^T x``. With LoRA dropout the two branches see different
inputs, so the *split* form ``y = x W^T + b + s (drop(x) A^T) B^T`` is used while training; and always
where W is in few bits (`silotune.privacy.quantized`), for a merged weight would be a dense copy to keep.

Per-sample gradients are measured here too, and added up to those of units. A parameter's ``grad_sample``
has shape ``[n, *parameter.shape]`` and type float32 (Opacus' convention). That of a LoRA B is stored
transposed, because the product is faster that way; `as_rows` and `shaped_as` hide it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from silotune.errors import SelfCheckFailed
from silotune.privacy.quantized import QuantizedLinear

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


@dataclass(frozen=True)
class Products:
    """What a LoRA layer multiplies with, all in the type of its matrix products.

    ``weight`` is ``[out, in]``, with the adapter merged in or not; ``a`` is ``[r, in]``, ``b`` is
    ``[out, r]``.
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    scale: float


class CastCache:
    """Reduced-precision copy of a frozen tensor, renewed when the tensor changes."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._key: tuple[int, int] | None = None
        self._copy: Tensor | None = None

    def get(self, source: Tensor) -> Tensor:
        """`source` in the cache's type; `source` itself where the type is already right."""
        if source.dtype == self._dtype:
            return source.detach()
        key = (source.data_ptr(), source._version)
        if self._copy is None or key != self._key:
            with torch.inference_mode(False), torch.no_grad():
                self._copy = source.detach().to(self._dtype)
            self._key = key
        return self._copy


class InputCast:
    """The last input in reduced precision: query, key and value of a block share one conversion."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._source: weakref.ref[Tensor] | None = None
        self._version = 0
        self._copy: Tensor | None = None

    def get(self, x: Tensor) -> Tensor:
        """`x` in the reduced type; `x` itself where the type is already right."""
        if x.dtype == self.dtype:
            return x
        if x.is_inference():  # has no version, and its copy could not be saved for a backward pass
            return x.to(self.dtype)
        last = None if self._source is None else self._source()
        if self._copy is None or last is not x or self._version != x._version:
            self._copy = x.to(self.dtype)
            self._source, self._version = weakref.ref(x), x._version
        return self._copy


class LoraSite:
    """One LoRA layer: its tensors and the merged weight, rebuilt once per weight change.

    Parameters
    ----------
    base : nn.Module
        The frozen layer with ``weight`` and ``bias``.
    transposed : bool
        The base weight is ``[in, out]`` (``fan_in_fan_out`` of PEFT, GPT-2's ``Conv1D``).
    a, b : nn.Parameter
        ``[r, in]`` and ``[out, r]``.
    scale : float
        ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
    cast : InputCast
        Of the type of the matrix products; shared by all layers of a model.
    """

    def __init__(
        self,
        *,
        base: nn.Module,
        transposed: bool,
        a: nn.Parameter,
        b: nn.Parameter,
        scale: float,
        sink: GradientSink,
        cast: InputCast,
    ) -> None:
        self.base = base
        self.transposed = transposed
        self.a, self.b, self.scale = a, b, scale
        self.sink = sink
        self.cast = cast
        self.dtype = cast.dtype
        self._base_cast, self._bias_cast = CastCache(self.dtype), CastCache(self.dtype)
        self._products: Products | None = None
        self._seen: tuple[Any, ...] = ()

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias, shape ``[out]``."""
        return cast("nn.Parameter | None", self.base.bias)

    def _weight(self) -> Tensor:
        weight = cast(Tensor, self.base.weight).detach()
        return weight.t() if self.transposed else weight

    def _current(self) -> bool:
        """Whether the merged weight still belongs to the tensors as they are.

        The adapter is compared by content, because writes through ``.data`` leave no version behind;
        the frozen weight, which nobody writes to in passing, by address and version.
        """
        if self._products is None:
            return False
        weight, a, b, scale = self._seen
        frozen = cast(Tensor, self.base.weight)
        return (
            weight == (frozen.data_ptr(), frozen._version)
            and scale == self.scale
            and a.device == self.a.device
            and torch.equal(a, self.a)
            and torch.equal(b, self.b)
        )

    def merged(self) -> Products:
        """Products with ``weight = W + s B A``."""
        if not self._current():
            with torch.inference_mode(False), torch.no_grad():
                self._merge()
        assert self._products is not None
        return self._products

    def _merge(self) -> None:
        frozen = cast(Tensor, self.base.weight)
        a, b = self.a.detach().clone(), self.b.detach().clone()
        weight = self._weight()
        buffer = None if self._products is None else self._products.weight
        if buffer is None or buffer.device != weight.device or buffer.shape != weight.shape:
            buffer = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
        if self.dtype == weight.dtype == a.dtype:
            torch.addmm(weight, b, a, alpha=self.scale, out=buffer)
        else:
            buffer.copy_(torch.addmm(weight.to(a.dtype), b, a, alpha=self.scale))
        self._products = Products(
            buffer, a.to(self.dtype), b.to(self.dtype), self.frozen_bias(), float(self.scale)
        )
        self._seen = ((frozen.data_ptr(), frozen._version), a, b, self.scale)

    def frozen(self) -> Tensor:
        """W, ``[out, in]``, in the type of the products."""
        if isinstance(self.base, QuantizedLinear):
            return self.base.weight.to(self.dtype)
        weight = self._base_cast.get(cast(Tensor, self.base.weight))
        return weight.t() if self.transposed else weight

    def frozen_bias(self) -> Tensor | None:
        """The base layer's bias in the type of the products."""
        return None if self.bias is None else self._bias_cast.get(self.bias)

    def split(self) -> Products:
        """Products with ``weight = W``."""
        a, b = self.a.detach().to(self.dtype), self.b.detach().to(self.dtype)
        return Products(self.frozen(), a, b, self.frozen_bias(), float(self.scale))


def _by_sample(x: Tensor) -> Tensor:
    """``[n, ..., d]`` as ``[n, positions, d]``; a plain ``[n, d]`` has one position."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _rows(x: Tensor) -> Tensor:
    """``[..., d]`` as ``[all positions, d]``."""
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class _LoraGradients:
    """Gradients of A, B and the bias, from ``dy`` and ``h = x A^T`` (None where not wanted)."""

    site: LoraSite
    scale: float

    def release(
        self, dy: Tensor, x: Tensor | None, h: Tensor | None, dh: Tensor | None, *, bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Hand the gradients to the sink (private), or return them for autograd.

        Parameters
        ----------
        dy, x : Tensor
            ``[n, positions, out]`` and ``[n, positions, in]``; x may be None if A is frozen.
        h, dh : Tensor or None
            ``x A^T`` and ``dy B``, both ``[n, positions, r]``; None if B or A is frozen.
        """
        site = self.site
        if not site.sink.private:
            return (
                None
                if dh is None or x is None
                else (_rows(dh * self.scale).t() @ _rows(x)).float(),
                None if h is None else (_rows(h * self.scale).t() @ _rows(dy)).float().t(),
                _rows(dy).sum(0, dtype=torch.float32) if bias else None,
            )
        if h is not None:
            # Twice as fast as the product in the order of B; readers cope with the strides.
            samples = torch.bmm((h * self.scale).transpose(1, 2), dy).transpose(1, 2)
            site.sink.add(site.b, samples)
        if dh is not None and x is not None:
            site.sink.add(site.a, torch.bmm((dh * self.scale).transpose(1, 2), x))
        if bias:
            assert site.bias is not None
            site.sink.add(site.bias, dy.sum(1, dtype=torch.float32))
        return None, None, None


class MergedLora(torch.autograd.Function):
    """``y = x (W + s B A)^T + bias``; see the module's docstring."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd functions take positional arguments
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, site: LoraSite
    ) -> Tensor:
        """Output ``[..., out]`` of input ``[n, ..., in]``, in the type of the input."""
        _, needs_a, needs_b, _, _ = ctx.needs_input_grad
        products, cast_x = site.merged(), site.cast.get(x)
        # With A frozen its r outputs are all that the backward pass needs of the input.
        h = linear(cast_x, products.a) if needs_b and not needs_a else None
        ctx.site, ctx.scale, ctx.x_dtype = site, products.scale, x.dtype
        ctx.save_for_backward(cast_x if needs_a else h, products.weight, products.a, products.b)
        return linear(cast_x, products.weight, products.bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the input; those of A, B and bias as the sink wants them."""
        kept, weight, a, b = ctx.saved_tensors
        needs_x, needs_a, needs_b, needs_bias, _ = ctx.needs_input_grad
        dy = dy.to(weight.dtype).contiguous()
        dx = (_rows(dy) @ weight).view(*dy.shape[:-1], -1).to(ctx.x_dtype) if needs_x else None
        dy3 = _by_sample(dy)
        x3 = _by_sample(kept) if needs_a else None
        h = None
        if needs_b:
            h = _by_sample(kept) if x3 is None else linear(x3, a)
        dh = dy3 @ b if needs_a else None
        rule = _LoraGradients(ctx.site, ctx.scale)
        return (dx, *rule.release(dy3, x3, h, dh, bias=needs_bias), None)


class SplitLora(torch.autograd.Function):
    """``y = x W^T + bias + s (z A^T) B^T`` with ``z = dropout(x)``."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd functions take positional arguments
        ctx: Any, x: Tensor, z: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, site: LoraSite
    ) -> Tensor:
        """Output ``[..., out]`` of inputs ``[n, ..., in]``, in the type of the input."""
        products = site.split()
        cast_z = z.to(site.dtype)
        h = linear(cast_z, products.a)
        y = linear(site.cast.get(x), products.weight, products.bias)
        _rows(y).addmm_(_rows(h), products.b.t(), alpha=products.scale)
        ctx.site, ctx.scale, ctx.x_dtype = site, products.scale, x.dtype
        ctx.save_for_backward(cast_z, h, products.a, products.b)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both inputs; those of A, B and bias as the sink wants them.

        W is asked for again, not kept: where it is in few bits, a layer's dense copy ends here.
        """
        z, h, a, b = ctx.saved_tensors
        needs_x, needs_z, needs_a, needs_b, needs_bias, _ = ctx.needs_input_grad
        dy = dy.to(z.dtype).contiguous()
        dx = (_rows(dy) @ ctx.site.frozen()).view(z.shape).to(ctx.x_dtype) if needs_x else None
        dy3 = _by_sample(dy)
        dh = dy3 @ b if needs_a or needs_z else None
        dz = None
        if needs_z and dh is not None:
            dz = (_rows(dh) @ a).view(z.shape).mul_(ctx.scale).to(ctx.x_dtype)
        rule = _LoraGradients(ctx.site, ctx.scale)
        gradients = rule.release(
            dy3,
            _by_sample(z),
            _by_sample(h) if needs_b else None,
            dh if needs_a else None,
            bias=needs_bias,
        )
        return (dx, dz, *gradients, None)


class TrainedLinear(torch.autograd.Function):
    """``y = x W^T + bias`` with W, the bias or both trained; always in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, sink: GradientSink
    ) -> Tensor:
        """Output ``[..., out]`` of input ``[n, ..., in]``, in the type of the input."""
        ctx.sink, ctx.weight, ctx.bias = sink, weight, bias
        ctx.save_for_backward(x, weight.detach())
        cast_bias = None if bias is None else bias.detach().to(weight.dtype)
        return linear(x.to(weight.dtype), weight.detach(), cast_bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the input; those of W and the bias as the sink wants them."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        x_dtype, x, dy = x.dtype, x.to(weight.dtype), dy.to(weight.dtype).contiguous()
        dx = (_rows(dy) @ weight).view(x.shape).to(x_dtype) if needs_x else None
        if not ctx.sink.private:
            d_weight = _rows(dy).t() @ _rows(x) if needs_weight else None
            return dx, d_weight, _rows(dy).sum(0) if needs_bias else None, None
        dy3 = _by_sample(dy)
        if needs_weight:
            ctx.sink.add(ctx.weight, torch.bmm(dy3.transpose(1, 2), _by_sample(x)))
        if needs_bias:
            ctx.sink.add(ctx.bias, dy3.sum(1))
        return dx, None, None, None


class Stack:
    """Several adapters side by side, for members that share a pass: each sequence goes through its own.

    Parameters
    ----------
    tensors : mapping of int to Tensor
        By ``id`` of each trained parameter: its values for all members, ``[members, *shape]``.
    of : Tensor
        The member of each sequence of the batch, int64 ``[n]``.
    """

    def __init__(self, tensors: Mapping[int, Tensor], of: Tensor) -> None:
        self._tensors, self._of = tensors, of

    def product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``x W^T`` of an input ``[n, positions, in]``, each sequence with its member's W.

        Raises
        ------
        SelfCheckFailed
            The layer does not see the batch as first dimension.
        """
        if len(x) != len(self._of):
            raise SelfCheckFailed("a layer does not see the batch as first dimension")
        return torch.bmm(x.to(dtype), self._own(weight).to(dtype).mT)

    def lora(self, x: Tensor, z: Tensor, site: LoraSite) -> Tensor:
        """What `SplitLora` computes; its gradients are autograd's, in the stacked tensors."""
        bias = site.frozen_bias()
        y: Tensor = FrozenLinear.apply(x, site.frozen(), bias, site.cast)  # type: ignore[no-untyped-call]
        h = self.product(_by_sample(z), site.a, site.dtype)
        more = self.product(h, site.b, site.dtype).view(y.shape)
        return torch.add(y, more.to(y.dtype), alpha=site.scale)

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """What `TrainedLinear` computes."""
        y = self.product(_by_sample(x), layer.weight, layer.weight.dtype)
        if layer.bias is not None:
            y = y + self._own(layer.bias)[:, None]
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    def _own(self, parameter: Tensor) -> Tensor:
        stacked = self._tensors.get(id(parameter))
        if stacked is None:  # an A that is frozen: the same for all
            return parameter.detach().expand(len(self._of), *parameter.shape)
        return stacked.index_select(0, self._of)


class FrozenLinear(torch.autograd.Function):
    """``y = x W^T + bias`` with frozen W and bias in a reduced type; input and output keep theirs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, cast: InputCast
    ) -> Tensor:
        """Output ``[..., out]`` of input ``[..., in]``, in the type of the input."""
        ctx.save_for_backward(weight)
        return linear(cast.get(x), weight, bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the input only."""
        (weight,) = ctx.saved_tensors
        return (dy.to(weight.dtype) @ weight).to(dy.dtype), None, None, None
