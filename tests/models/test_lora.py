"""Which modules get an adapter, and where its matrices start."""

import hashlib
import math

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.errors import ModelError, TargetModulesUnknown
from silotune.models.base import wrap
from silotune.models.layout import initial_matrix
from tests.models.model_material import a_plan

_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "bert": (hf.BertConfig(**_SHAPE), {"query", "value"}, "layer"),
    "roberta": (hf.RobertaConfig(**_SHAPE), {"query", "value"}, "layer"),
    "distilbert": (
        hf.DistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=48, vocab_size=64),
        {"q_lin", "v_lin"},
        "layer",
    ),
    "modernbert": (
        hf.ModernBertConfig(**_SHAPE, pad_token_id=0, cls_token_id=1, sep_token_id=2),
        {"Wqkv"},
        "layers",
    ),
    "deberta": (hf.DebertaV2Config(**_SHAPE), {"value_proj"}, "layer"),
    "llama": (hf.LlamaConfig(**_SHAPE), {"q_proj", "v_proj"}, "layers"),
    "gpt2": (
        hf.GPT2Config(
            n_embd=32, n_layer=3, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=1
        ),
        {"c_attn"},
        "h",
    ),
    "gpt_neox": (hf.GPTNeoXConfig(**_SHAPE), {"query_key_value"}, "layers"),
}


def adapted(model) -> dict[str, bool]:
    """Paths of adapted modules in the base model, and whether A is trained."""
    return {
        name.removeprefix("base_model.model.").split(".lora_A")[0]: p.requires_grad
        for name, p in model.named_parameters()
        if ".lora_A." in name
    }


def built(family: str, **settings):
    config = FAMILIES[family][0]
    task = settings.pop("task", "text_classification")
    kind = hf.AutoModelForCausalLM if task == "causal_lm" else hf.AutoModel
    return wrap(kind.from_config(config), a_plan("base", task, **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_finds_query_and_value_in_every_layer(family):
    _, names, layers = FAMILIES[family]
    found = adapted(built(family))
    assert {path.rsplit(".", 1)[-1] for path in found} == names
    assert len(found) == 3 * len(names)
    assert all(f"{layers}." in path for path in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_layers_are_the_last_ones(family):
    _, names, layers = FAMILIES[family]
    found = adapted(built(family, lora__last_layers=2))
    assert len(found) == 2 * len(names)
    assert {path.split(f"{layers}.")[1].split(".")[0] for path in found} == {"1", "2"}


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "text_classification"), ("llama", "causal_lm"), ("gpt2", "causal_lm")],
)
def test_all_linear_adapts_all_that_the_loss_depends_on_and_nothing_else(family, task):
    model = built(family, task=task, lora__target_modules="all-linear")
    per_layer = {"bert": 6, "llama": 7, "gpt2": 4}[family]
    assert len(adapted(model)) == 3 * per_layer
    ids = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    out = model(input_ids=ids)
    (out.logits if task == "causal_lm" else out.last_hidden_state).square().sum().backward()
    unmoved = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unmoved == []


def test_named_modules_may_be_paths():
    found = adapted(built("bert", lora__target_modules=["attention.output.dense"]))
    assert len(found) == 3
    assert all(path.endswith("attention.output.dense") for path in found)


@pytest.mark.parametrize("name", ["q_proj", "word_embeddings", "encoder", "LayerNorm", "uery"])
def test_an_unknown_target_is_refused_with_the_valid_names(name):
    with pytest.raises(TargetModulesUnknown) as caught:
        built("bert", lora__target_modules=["query", name])
    assert f"called {name}" in caught.value.detail
    assert ("did you mean query?" in caught.value.detail) == (name == "uery")
    assert "dense, key, query, value" in caught.value.detail


def test_more_last_layers_than_there_are_is_refused():
    with pytest.raises(ModelError, match="3 numbered layers"):
        built("llama", lora__last_layers=4)


def test_frozen_a_leaves_only_b_to_train():
    model = built("llama", aggregation__strategy="ffa")
    assert set(adapted(model).values()) == {False}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_B." in name for name in trained)


def test_a_fresh_adapter_changes_nothing():
    ids = torch.arange(10).reshape(2, 5)
    base = hf.AutoModel.from_config(FAMILIES["bert"][0]).eval()
    with torch.no_grad():
        before = base(input_ids=ids).last_hidden_state
        after = wrap(base, a_plan("base")).eval()(input_ids=ids).last_hidden_state
    assert torch.equal(before, after)


def test_the_start_is_a_function_of_seed_and_name_alone():
    name = "base_model.model.x.lora_A.weight"
    start = initial_matrix(name, (4, 6), a_plan("one"))
    assert np.array_equal(start, initial_matrix(name, (4, 6), a_plan("two", lora__dropout=0.1)))
    assert not np.array_equal(start, initial_matrix(name, (4, 6), a_plan("one", plan__seed=8)))
    assert not np.array_equal(start, initial_matrix("y.lora_A.weight", (4, 6), a_plan("one")))


def test_without_a_seed_the_start_depends_on_the_whole_plan():
    name, unseeded = "x.lora_A.weight", a_plan("one", plan__seed=None)
    start = initial_matrix(name, (4, 6), unseeded)
    assert np.array_equal(start, initial_matrix(name, (4, 6), unseeded.override({})))
    other = unseeded.override({"plan.purpose": "another"})
    assert not np.array_equal(start, initial_matrix(name, (4, 6), other))


def test_the_start_is_the_stated_stream():
    name = "x.lora_A.weight"
    stream = hashlib.shake_256(b"silotune lora v1\0seed 7\0x.lora_A.weight").digest(16)
    words = [int.from_bytes(stream[i : i + 4], "little") for i in range(0, 16, 4)]
    expected = [((w >> 8) / 2**23 - 1) / math.sqrt(2) for w in words]
    assert initial_matrix(name, (2, 2), a_plan("b")).ravel() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**62))
def test_a_starts_uniform_in_pefts_own_range_and_b_at_zero(seed):
    plan = a_plan("b", plan__seed=seed)
    a = initial_matrix("x.lora_A.weight", (8, 512), plan)
    assert np.abs(a).max() <= 1 / math.sqrt(512)
    # 4,096 uniform values: each bound is 6 standard errors, false alarm under 1e-8 an example.
    assert abs(a.mean()) * math.sqrt(512) < 6 / math.sqrt(3 * 4096)
    assert a.var() * 512 == pytest.approx(1 / 3, abs=6 * math.sqrt(4 / 45 / 4096))
    assert not initial_matrix("x.lora_B.weight", (512, 8), plan).any()
