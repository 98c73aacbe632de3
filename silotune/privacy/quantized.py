"""Frozen weights in few bits: layers that multiply by them, and their gradients.

A base model that is never trained need not lie in memory in float32. Here its matrices are kept as
8-bit integers with one scale a row, or as 4-bit NormalFloat numbers with one scale a block of 64 (NF4:
Dettmers et al., "QLoRA", 2023), and are made dense when a layer multiplies by them: forward, and again
backward, so that no dense copy outlives a product. What passes through is not quantised: outputs and
gradients are exactly those of a layer that has the dense matrix.

Libraries' own 8-bit layers round activations too, by scales and outliers of a whole batch, and so let
one record change another's gradient. That is why none of them stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from silotune.errors import ModelError
from silotune.percents import percent

Kind = Literal["int8", "nf4"]

_LARGEST = 127
_BLOCK = 64
_AT_A_TIME = 4096  # rows or blocks, while codes are made: a table's copies need not all be there
_TINY = torch.finfo(torch.float32).tiny
_OFFSET = 0.9677083  # of the outermost quantile: the mean of 1 - 1/32 and 1 - 1/30
_MOST = 0.5  # of a model's float32 size; more is left where most weights are in no layer of these


def _levels() -> Tensor:
    """The 16 numbers of NF4: quantiles of a normal distribution, from -1 to 1, with 0 among them."""

    def quantiles(count: int) -> list[float]:
        step = (_OFFSET - 0.5) / count
        return [NormalDist().inv_cdf(_OFFSET - i * step) for i in range(count)]

    above, below = quantiles(8), quantiles(7)
    return torch.tensor(sorted([*above, 0.0, *(-x for x in below)])) / above[0]


_LEVELS = _levels()
_MIDDLES = torch.tensor([(a + b) / 2 for a, b in pairwise(_LEVELS.tolist())])
_PAIRS = torch.stack(
    [_LEVELS.repeat_interleave(16), _LEVELS.repeat(16)], 1
)  # of a byte's two halves


def _largest(rows: Tensor) -> Tensor:
    """The largest absolute value of each row ``[n, columns]``: ``[n, 1]``."""
    return torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))


class FewBits(nn.Module, ABC):
    """A frozen matrix ``[rows, columns]`` in few bits.

    Parameters
    ----------
    matrix : Tensor
        Float32, ``[rows, columns]``.
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix in float32."""


class Int8Matrix(FewBits):
    """Integers from -127 to 127 times a scale for each row."""

    codes: Tensor
    scales: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        scales = _largest(matrix) / _LARGEST
        parts = zip(torch.split(matrix, _AT_A_TIME), torch.split(scales, _AT_A_TIME), strict=True)
        codes = [(rows / scale.clamp(min=_TINY)).round().to(torch.int8) for rows, scale in parts]
        self.register_buffer("codes", torch.cat(codes))
        self.register_buffer("scales", scales)

    def dense(self) -> Tensor:
        """The matrix in float32."""
        return self.codes.to(torch.float32).mul_(self.scales)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix in float32, ``[*ids.shape, columns]``."""
        return self.codes[ids].to(torch.float32).mul_(self.scales[ids])


class Nf4Matrix(FewBits):
    """Two numbers a byte, each one of 16 levels, times a scale for each 64 numbers."""

    codes: Tensor
    scales: Tensor
    pairs: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        flat = matrix.flatten()
        blocks = pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
        scales = _largest(blocks)
        parts = zip(torch.split(blocks, _AT_A_TIME), torch.split(scales, _AT_A_TIME), strict=True)
        levels = [
            torch.bucketize(rows / scale.clamp(min=_TINY), _MIDDLES).to(torch.uint8)
            for rows, scale in parts
        ]
        high, low = torch.cat(levels).view(-1, 2).unbind(1)
        self.register_buffer("codes", high * 16 + low)
        self.register_buffer("scales", scales)
        self.register_buffer("pairs", _PAIRS, persistent=False)

    def dense(self) -> Tensor:
        """The matrix in float32."""
        numbers = self.pairs.index_select(0, self.codes.int()).view(-1, _BLOCK).mul_(self.scales)
        rows, columns = self.shape
        return numbers.flatten()[: rows * columns].view(rows, columns)


class _Product(torch.autograd.Function):
    """``y = x W^T + bias`` with W made dense for the product, and again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        """Output ``[..., out]`` of input ``[..., in]``, in the type of the input."""
        ctx.layer, ctx.dtype = layer, dtype
        # No view of another tensor, as `linear` may give: models change what they get in place.
        y = torch.empty(*x.shape[:-1], layer.out_features, dtype=dtype, device=x.device)
        rows, into = x.to(dtype).reshape(-1, layer.in_features), y.view(-1, layer.out_features)
        weight = layer.weight.to(dtype).t()
        if layer.bias is None:
            torch.mm(rows, weight, out=into)
        else:
            torch.addmm(layer.bias.detach().to(dtype), rows, weight, out=into)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the input only."""
        weight = ctx.layer.weight.to(ctx.dtype)
        return (dy.to(ctx.dtype) @ weight).to(dy.dtype), None, None


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is in few bits.

    Parameters
    ----------
    matrix : FewBits
        ``[out, in]``.
    bias : nn.Parameter or None
        ``[out]``, frozen.
    """

    def __init__(self, matrix: FewBits, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, bias
        self.out_features, self.in_features = matrix.shape

    @property
    def weight(self) -> Tensor:
        """The weight ``[out, in]`` in float32, made anew."""
        return self.matrix.dense()

    def product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Output ``[..., out]`` of input ``[..., in]``, the product taken in a type."""
        y: Tensor = _Product.apply(x, self, dtype)  # type: ignore[no-untyped-call]
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Output ``[..., out]`` of input ``[..., in]``."""
        return self.product(x, torch.float32)


class QuantizedEmbedding(nn.Module):
    """A frozen table of embeddings in 8 bits.

    Parameters
    ----------
    matrix : Int8Matrix
        ``[tokens, width]``.
    layer : nn.Embedding
        Which it replaces.
    """

    def __init__(self, matrix: Int8Matrix, layer: nn.Embedding) -> None:
        super().__init__()
        self.matrix = matrix
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx = layer.padding_idx
        self.factor = float(
            getattr(layer, "embed_scale", 1.0)
        )  # Gemma 3 multiplies inside the layer

    @property
    def weight(self) -> Tensor:
        """The table in float32, made anew."""
        return self.matrix.dense()

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``[..., width]`` of ids ``[...]``."""
        rows = self.matrix.rows(ids)
        return rows if self.factor == 1.0 else rows.mul_(self.factor)


def quantize(model: nn.Module, kind: Kind) -> None:
    """Keep the frozen matrices of a model in few bits, in place.

    Linear layers (and GPT-2's ``Conv1D``) and tables of embeddings are replaced, tied ones by tied
    ones; a table, and what is tied to one, has 8 bits always. All else stays in float32.

    Parameters
    ----------
    model : nn.Module
        With its adapter in place, on the CPU.
    kind : str
        ``int8`` or ``nf4``.

    Raises
    ------
    ModelError
        Most of its weights are in other layers.
    """
    full = frozen_bytes(model)
    for parent, name, layer, matrix in _in_few_bits(model, kind):
        if isinstance(layer, nn.Embedding):
            assert isinstance(matrix, Int8Matrix)
            setattr(parent, name, QuantizedEmbedding(matrix, layer))
        else:
            setattr(parent, name, QuantizedLinear(matrix, layer.bias))
    if (part := frozen_bytes(model) / full) > _MOST:
        raise ModelError(
            "most weights of the model are in layers that can't be kept in few bits: "
            f"{percent(part)} of its size would be left",
            remedy="Leave model.quantization out of the plan.",
        )


def round_weights(model: nn.Module, kind: Kind) -> None:
    """Give the frozen matrices of a model the values that `quantize` keeps, in their own layers.

    The model then answers as the quantised one does, and its weights can be changed and written.
    """
    with torch.no_grad():
        for _, _, layer, matrix in _in_few_bits(model, kind):
            dense = matrix.dense()
            layer.weight.copy_(dense.t() if isinstance(layer, Conv1D) else dense)


def _in_few_bits(model: nn.Module, kind: Kind) -> Iterator[tuple[nn.Module, str, Any, FewBits]]:
    """Every layer that can be replaced: its parent, its name there, its matrix; tied ones share it."""
    tables = {id(m.weight) for m in model.modules() if _is_table(m)}
    matrices: dict[int, FewBits] = {}
    for parent, name, layer in list(_frozen_layers(model)):
        weight = layer.weight
        if id(weight) not in matrices:
            small = Int8Matrix if kind == "int8" or id(weight) in tables else Nf4Matrix
            dense = weight.detach().t() if isinstance(layer, Conv1D) else weight.detach()
            matrices[id(weight)] = small(dense.float().contiguous())
        yield parent, name, layer, matrices[id(weight)]


def _is_table(layer: nn.Module) -> bool:
    return type(layer) is nn.Embedding or (
        isinstance(layer, nn.Embedding) and hasattr(layer, "embed_scale")
    )


def _frozen_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Every layer that can be replaced, with its parent and its name there."""
    for path, parent in model.named_modules():
        if ".lora_" in f".{path}":  # a frozen A is part of the adapter
            continue
        for name, layer in parent.named_children():
            if type(layer) not in {nn.Linear, Conv1D} and not _is_table(layer):
                continue
            if not any(parameter.requires_grad for parameter in layer.parameters()):
                yield parent, name, layer


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of what a model has and does not train; what is tied counts once."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    tensors = {t.data_ptr(): t for t in (*frozen, *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
