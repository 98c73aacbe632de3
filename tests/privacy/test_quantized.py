"""Weights in few bits: what they become, and that gradients are those of the numbers they became."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding, linear
from transformers.pytorch_utils import Conv1D

from silotune.errors import ModelError
from silotune.models.base import load_model
from silotune.privacy.clipping import attach
from silotune.privacy.quantized import (
    Int8Matrix,
    Nf4Matrix,
    QuantizedEmbedding,
    QuantizedLinear,
    frozen_bytes,
    quantize,
)
from tests.models.architectures import NAMED, write_model
from tests.models.catalogue import PRIVATE, clipped, engine_sum, middle, one_by_one, spread
from tests.models.model_material import a_plan, minilm

SHAPES = [(1, 1), (3, 5), (64, 64), (31, 77), (7, 128)]
# The table of NF4 as its paper prints it, to four digits (Dettmers et al., 2023, appendix E).
PRINTED = [
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
]  # fmt: skip


def matrix(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_8_bit_number_is_off_by_half_a_step_of_its_row_at_most(shape):
    weight = matrix(shape)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((Int8Matrix(weight).dense() - weight).abs() <= step / 2 * 1.001).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_4_bit_number_is_the_nearest_level_of_its_block(shape):
    weight = matrix(shape)
    found = Nf4Matrix(weight).dense().flatten()
    for start in range(0, weight.numel(), 64):
        block = weight.flatten()[start : start + 64]
        levels = torch.tensor(PRINTED) * block.abs().max()
        distance = (block[:, None] - levels).abs().amin(1)
        off = (found[start : start + 64] - block).abs() - distance
        assert (off.abs() <= 1e-4 * block.abs().max()).all()


@pytest.mark.parametrize("kind", [Int8Matrix, Nf4Matrix])
def test_rows_of_zeros_stay_zeros(kind):
    weight = torch.zeros(3, 70)
    weight[1] = 1.0
    assert torch.equal(kind(weight).dense(), weight)


def test_rows_of_a_table_are_those_of_the_matrix():
    table, ids = Int8Matrix(matrix((20, 6))), torch.tensor([[3, 3, 0], [19, 1, 2]])
    assert torch.equal(table.rows(ids), embedding(ids, table.dense()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_and_its_gradient_are_those_of_the_dense_matrix(dtype):
    layer = QuantizedLinear(Nf4Matrix(matrix((5, 9))), nn.Parameter(matrix((5,), 1)))
    layer.requires_grad_(False)
    x = matrix((2, 3, 9), 2).requires_grad_()
    y, dy = layer.product(x, dtype), matrix((2, 3, 5), 3)
    y.backward(dy)
    weight = layer.weight.to(dtype)
    assert torch.equal(y, linear(x.to(dtype), weight, layer.bias.to(dtype)).float())
    assert torch.equal(x.grad, (dy.to(dtype) @ weight).float())


def test_no_dense_copy_outlives_a_product():
    layer = QuantizedLinear(Int8Matrix(matrix((300, 200))), None)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(matrix((4, 200)).requires_grad_())
    assert kept == []


class Odd(nn.Module):
    """A table, tied to the layer that maps back to it, a transposed layer, and a trained one."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.inner = Conv1D(48, 32)
        self.outer = nn.Linear(48, 32)
        self.back = nn.Linear(32, 50, bias=False)
        self.back.weight = self.table.weight
        self.requires_grad_(False)
        self.head = nn.Linear(32, 2)

    def forward(self, ids):
        return self.back(self.outer(self.inner(self.table(ids))))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_layers_are_replaced_tied_ones_stay_tied_and_trained_ones_stay(kind):
    model, ids = Odd(), torch.arange(50)
    before = model(ids)
    quantize(model, kind)
    assert type(model.table) is QuantizedEmbedding
    assert {type(model.inner), type(model.outer), type(model.back)} == {QuantizedLinear}
    assert model.back.matrix is model.table.matrix
    assert type(model.table.matrix) is Int8Matrix
    assert type(model.outer.matrix) is {"int8": Int8Matrix, "nf4": Nf4Matrix}[kind]
    assert type(model.head) is nn.Linear
    # 8 bits: a few in a thousand; 4 bits: about 9 in a hundred for each of two layers.
    error = float((model(ids) - before).norm() / before.norm())
    assert error < {"int8": 0.02, "nf4": 0.25}[kind]


def test_a_model_whose_weights_are_elsewhere_is_refused():
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Linear(4, 4)).requires_grad_(False)
    with pytest.raises(ModelError, match=r"can't be kept in few bits: 99\.8% of"):
        quantize(model, "int8")


def dense_twin(model):
    """A copy of a loaded model with ordinary layers that hold what the weights became."""
    module = copy.deepcopy(model.module)
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, QuantizedLinear):
                twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                if layer.bias is not None:
                    twin.bias.data = layer.bias.data
                twin.weight.data = layer.weight
            elif isinstance(layer, QuantizedEmbedding):
                twin = nn.Embedding.from_pretrained(layer.weight * layer.factor)
            else:
                continue
            setattr(parent, name, twin.requires_grad_(False))
    return copy.copy(model).__class__(**{**vars(model), "module": module})


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("name", "task"), [("BERT", "text_classification"), ("Gemma 3", "causal_lm")]
)
def test_adapters_gradients_are_those_on_the_dequantised_weights(name, task, kind, tmp_path):
    base = write_model(NAMED[name], tmp_path, task=task)
    plan = a_plan(base, task, **PRIVATE, model__quantization=kind)
    model = load_model(plan, attention="eager", dtype="float32", trial=False)
    spread(model)
    records = one_by_one(dense_twin(model), torch.float32)
    clip = middle(records)
    expected = clipped(records, clip)
    found = engine_sum(model, attach(model.module), clip=clip, size=3)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_a_real_base_model_takes_a_part_of_its_memory_and_points_where_it_did():
    texts = ("kidney failure", "renal disease", "broken arm")
    sizes, found = {}, {}
    for kind in ("none", "int8", "nf4"):
        model = load_model(a_plan(minilm(), model__quantization=kind), trial=False)
        sizes[kind] = frozen_bytes(model.module)
        data = model.task.encode(
            [{"text": text, "label": "no"} for text in texts], model.tokenizer, plan=model.plan
        )
        with model.module.inference():
            found[kind] = model.module.embed(model.task.collate(data, range(3), model.device))
    assert sizes["none"] == pytest.approx(4 * 22.7e6, rel=0.01)
    for kind, most, alike in (("int8", 0.27, 0.999), ("nf4", 0.22, 0.97)):
        assert sizes[kind] < most * sizes["none"]
        assert float((found[kind] * found["none"]).sum(1).min()) > alike
        kidney, renal, arm = found[kind]
        assert kidney @ renal > 0.5 > kidney @ arm
