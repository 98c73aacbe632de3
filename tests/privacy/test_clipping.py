"""Per-sample gradients of attached layers against one sequence at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from slow_truth import (
    CLASSES,
    Shape,
    Toy,
    alone,
    randomise,
    relative_error,
    rows,
    sequences,
    toy,
    toy_losses,
)
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from silotune.errors import LayerUnsupported, SelfCheckFailed
from silotune.privacy.clipping import attach
from silotune.privacy.layers import InputCast

TOLERANCE = 1e-5

shapes = st.builds(
    Shape,
    width=st.integers(4, 17),
    rank=st.integers(1, 9),
    rslora=st.booleans(),
    twice=st.booleans(),
    checkpointing=st.sampled_from(["none", "reentrant", "saved"]),
    freeze=st.sampled_from(["none", "a", "b"]),
    head_bias=st.booleans(),
)


def worst_error(attached, truth):
    """Largest relative error of a whole per-sample gradient."""
    samples = [p.grad_sample for p in attached.parameters.values()]
    assert all(s.dtype == torch.float32 for s in samples)
    return max(
        relative_error([s[row] for s in samples], expected) for row, expected in enumerate(truth)
    )


def small_bert():
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def small_llama(*, tied=False):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=40,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def small_gpt2():
    config = GPT2Config(
        vocab_size=50, n_embd=24, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config)


def small_vit():
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=16,
        patch_size=8,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def text_batch(n=5, longest=9):
    batch = sequences(n, longest=longest, seed=3)
    keep = batch["mask"] > 0
    return {
        "input_ids": batch["ids"] + 1,
        "attention_mask": keep.long(),
        "target": batch["target"],
    }


def text_rows(batch, row):
    length = int(batch["attention_mask"][row].sum())
    return {
        key: value[row : row + 1, :length] if value.dim() > 1 else value[row : row + 1]
        for key, value in batch.items()
    }


def classify(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "target"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    return F.cross_entropy(model(**inputs).logits, batch["target"], reduction="none")


def generate(model, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits
    if ids.shape[1] < 2:
        return (logits * 0).sum((1, 2))
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    keep = mask[:, 1:].to(each.dtype)
    return (each * keep).sum(1) / keep.sum(1).clamp(min=1)


MODELS = {
    "bert query value": (small_bert, ["query", "value"], ["classifier"], classify),
    "bert all linear": (small_bert, "all-linear", ["classifier"], classify),
    "llama q v": (small_llama, ["q_proj", "v_proj"], None, generate),
    "llama all linear": (small_llama, "all-linear", None, generate),
    "tied llama with lm_head": (
        lambda: small_llama(tied=True),
        ["lm_head", "down_proj"],
        None,
        generate,
    ),
    "gpt2 conv1d": (small_gpt2, ["c_attn", "c_proj"], None, generate),
    "vit": (small_vit, "all-linear", ["classifier"], classify),
}


def adapted(build, targets, saved, **options):
    torch.manual_seed(0)
    options = {"r": 4, "fan_in_fan_out": build is small_gpt2, **options}
    model = get_peft_model(
        build(), LoraConfig(target_modules=targets, modules_to_save=saved, **options)
    )
    randomise(model, 1)
    return model.train()


@settings(max_examples=60, deadline=None)
@given(shape=shapes, n=st.integers(1, 6), longest=st.integers(1, 8), seed=st.integers(0, 999))
def test_every_sequence_gets_the_gradient_it_has_alone(shape, n, longest, seed):
    model, batch = toy(shape, seed=seed), sequences(n, longest=longest, seed=seed)
    truth = alone(model, batch)
    attached = attach(model)
    toy_losses(model, batch).sum().backward()
    assert worst_error(attached, truth) < TOLERANCE
    assert all(p.grad is None for p in attached.parameters.values())


@pytest.mark.parametrize("name", MODELS)
def test_transformers_models_give_the_gradients_of_sequences_alone(name):
    build, targets, saved, losses = MODELS[name]
    model = adapted(build, targets, saved)
    if build is small_vit:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(4, 3, 16, 16, generator=generator)
        batch = {"pixel_values": pixels, "target": torch.tensor([0, 1, 2, 1])}
        truth = alone(model, batch, losses, single=lambda b, r: rows(b, slice(r, r + 1)))
    else:
        batch = text_batch()
        truth = alone(model, batch, losses, single=text_rows)
    attached = attach(model)
    losses(model, batch).sum().backward()
    assert worst_error(attached, truth) < TOLERANCE


@pytest.mark.parametrize("reentrant", [True, False])
def test_transformers_gradient_checkpointing_changes_nothing(reentrant):
    model = adapted(small_llama, "all-linear", None)
    batch = text_batch()
    truth = alone(model, batch, generate, single=text_rows)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    attached = attach(model)
    generate(model, batch).sum().backward()
    assert worst_error(attached, truth) < TOLERANCE


def test_without_privacy_the_same_layers_give_autograds_own_gradients():
    for shape in (Shape(), Shape(twice=True, rslora=True), Shape(freeze="a"), Shape(freeze="b")):
        model, batch = toy(shape), sequences(5)
        plain = copy.deepcopy(model)
        for _ in range(2):
            toy_losses(plain, batch).sum().backward()
        attached = attach(model, private=False)
        for _ in range(2):
            toy_losses(model, batch).sum().backward()
        expected = [p.grad.double() for p in plain.parameters() if p.requires_grad]
        found = [p.grad for p in attached.parameters.values()]
        assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("n", [1, 6])
def test_dropout_of_the_adapter_draws_as_peft_does_and_gives_its_gradients(n):
    model = toy(Shape(dropout=0.4, twice=True))
    plain, attached = copy.deepcopy(model), attach(model)
    assert "2 split LoRA" in attached.description
    batch = sequences(n)
    torch.manual_seed(5)
    toy_losses(plain, batch).sum().backward()
    torch.manual_seed(5)
    toy_losses(model, batch).sum().backward()
    expected = [p.grad.double() for p in plain.parameters() if p.requires_grad]
    found = [p.grad_sample.sum(0) for p in attached.parameters.values()]
    assert relative_error(found, expected) < TOLERANCE


def test_dropout_is_off_in_evaluation():
    model = toy(Shape(dropout=0.4)).eval()
    batch = sequences(4)
    expected = toy_losses(model, batch)
    attach(model)
    torch.testing.assert_close(toy_losses(model, batch), expected)


def test_a_bare_head_on_cached_features_is_enough():
    head, features = nn.Linear(9, 3), torch.randn(5, 9)
    target = torch.tensor([0, 1, 2, 0, 1])
    attached = attach(head)
    F.cross_entropy(head(features), target, reduction="none").sum().backward()
    for row in range(5):
        one = F.cross_entropy(
            F.linear(features[row : row + 1], head.weight, head.bias), target[row : row + 1]
        )
        weight, bias = torch.autograd.grad(one, [head.weight, head.bias])
        torch.testing.assert_close(attached.parameters["weight"].grad_sample[row], weight)
        torch.testing.assert_close(attached.parameters["bias"].grad_sample[row], bias)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_base_layers_are_covered(bias):
    torch.manual_seed(0)
    model = get_peft_model(Toy(Shape()), LoraConfig(r=2, bias=bias, target_modules=["first"]))
    model.base_model.model.norm.requires_grad_(False)
    randomise(model, 0)
    batch = sequences(4)
    truth = alone(model.train(), batch)
    attached = attach(model)
    assert any(name.endswith("bias") for name in attached.parameters)
    toy_losses(model, batch).sum().backward()
    assert worst_error(attached, truth) < TOLERANCE


def test_two_linear_layers_may_share_a_trained_weight():
    class Shared(Toy):
        def __init__(self):
            super().__init__(Shape())
            self.again = nn.Linear(12, 12)
            self.again.weight = self.first.weight

        def block(self, x):
            return self.second(torch.tanh(self.again(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    model = Shared()
    for part in (model.embedding, model.norm):
        part.requires_grad_(False)
    batch = sequences(4)
    truth = alone(model, batch)
    attached = attach(model)
    toy_losses(model, batch).sum().backward()
    assert worst_error(attached, truth) < TOLERANCE


def test_a_layer_without_a_rule_is_left_to_opacus_and_said_so():
    model = toy()
    model.base_model.model.norm.requires_grad_(True)
    batch = sequences(4)
    truth = alone(model, batch)
    attached = attach(model)
    toy_losses(model, batch).sum().backward()
    assert worst_error(attached, truth) < TOLERANCE
    assert "Opacus hooks for base_model.model.norm (LayerNorm)" in attached.description
    attached.check_gradients(tuple(attached.parameters.values()), 4)


def test_the_description_counts_layers():
    description = attach(toy()).description
    assert "2 merged LoRA" in description
    assert "1 trained linear" in description
    assert "float32 products" in description


@pytest.mark.parametrize("change", ["in place", "data", "optimizer", "scale", "base"])
def test_the_merged_weight_follows_every_change(change):
    model = toy()
    attach(model)
    batch = sequences(3)
    toy_losses(model, batch)
    layer = model.base_model.model.first
    weight = layer.lora_B["default"].weight
    if change == "in place":
        with torch.no_grad():
            weight.mul_(2)
    elif change == "data":
        weight.data.mul_(2)
    elif change == "optimizer":
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.3).step()
    elif change == "scale":
        layer.set_scale("default", 5.0)
    else:
        with torch.no_grad():
            layer.base_layer.weight.add_(0.1)
    found = toy_losses(model, batch)
    torch.testing.assert_close(found, toy_losses(detached_copy(model), batch))


def detached_copy(model):
    """The same weights in a model that was never attached."""
    fresh = toy()
    fresh.load_state_dict(model.state_dict())
    for name, module in fresh.named_modules():
        if hasattr(module, "set_scale"):
            module.scaling = dict(model.get_submodule(name).scaling)
    return fresh


def test_the_merged_weight_is_built_once_a_change(monkeypatch):
    built = []
    plain = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: built.append(1) or plain(*a, **k))
    model = toy()
    attach(model)
    for _ in range(3):
        toy_losses(model, sequences(3)).sum().backward()
        model.zero_grad()
        for parameter in model.parameters():
            parameter.grad_sample = None
    assert len(built) == 2


def test_weights_changed_between_forward_and_backward_are_noticed():
    model = toy()
    attach(model)
    losses = toy_losses(model, sequences(3))
    model.base_model.model.first.lora_A["default"].weight.data.add_(1.0)
    toy_losses(model, sequences(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_inference_mode_leaves_nothing_that_blocks_training():
    model, batch = toy(), sequences(3)
    attached = attach(model)
    with torch.inference_mode():
        toy_losses(model, batch)
    toy_losses(model, batch).sum().backward()
    attached.check_gradients(tuple(attached.parameters.values()), 3)


def test_a_disabled_adapter_is_respected():
    model, batch = toy(), sequences(3)
    with model.disable_adapter():
        expected = toy_losses(model, batch)
    attach(model)
    with model.disable_adapter():
        torch.testing.assert_close(toy_losses(model, batch), expected)


def test_gradients_that_were_used_are_not_added_to():
    model, batch = toy(), sequences(3)
    attached = attach(model)
    toy_losses(model, batch).sum().backward()
    for parameter in attached.parameters.values():
        parameter.grad_sample._processed = True
    with pytest.raises(SelfCheckFailed, match="not cleared"):
        toy_losses(model, batch).sum().backward()


def state_of(model):
    modules = [(name, sorted(m.__dict__), type(m).forward) for name, m in model.named_modules()]
    parameters = [(name, sorted(p.__dict__)) for name, p in model.named_parameters()]
    hooks = [
        (len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks))
        for m in model.modules()
    ]
    return modules, parameters, hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detach_restores_everything(dtype):
    model = toy(Shape(width=120))
    model.base_model.model.norm.requires_grad_(True)
    marker = nn.Linear.forward.__get__(model.base_model.model.second)
    model.base_model.model.second.forward = marker
    before, expected = state_of(model), toy_losses(model, sequences(3))
    attached = attach(model, dtype=dtype)
    assert state_of(model) != before
    toy_losses(model, sequences(3)).sum().backward()
    attached.clear()
    attached.detach()
    assert state_of(model) == before
    assert model.base_model.model.second.forward is marker
    model.base_model.model.second.__dict__.pop("forward")
    toy_losses(model, sequences(3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    del expected


def refused(model, match):
    before = state_of(model)
    with pytest.raises(LayerUnsupported, match=match):
        attach(model)
    assert state_of(model) == before


def test_dora_is_refused_by_name():
    refused(
        adapted(small_bert, ["query"], None, use_dora=True), r"0\.attention\.self\.query: .*Dora"
    )


def test_lora_bias_is_refused_by_name():
    refused(adapted(small_bert, ["query"], None, lora_bias=True), "query: lora_bias")


def test_lora_on_an_embedding_is_refused_by_name():
    refused(adapted(small_bert, ["word_embeddings"], None), "word_embeddings: LoRA on Embedding")


def test_lora_on_a_convolution_is_refused_by_name():
    refused(adapted(small_vit, ["projection", "query"], None), "projection: LoRA on Conv2d")


def test_trainable_tokens_are_refused_by_name():
    model = adapted(small_bert, ["query"], None, trainable_token_indices={"word_embeddings": [1]})
    refused(model, "word_embeddings")


def test_two_active_adapters_are_refused():
    model = get_peft_model(Toy(Shape()), LoraConfig(r=2, target_modules=["first"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    model.base_model.set_adapter(["default", "other"])
    refused(model, "2 adapters are active")


def test_a_merged_adapter_is_refused():
    model = toy()
    model.base_model.model.first.merge()
    refused(model, "first: the adapter is merged")


def test_a_trained_parameter_without_a_rule_is_refused_by_name():
    model = toy()
    model.base_model.model.free = nn.ParameterDict({"shift": torch.zeros(3)})
    refused(model, r"model\.free: .* shift")


def test_a_trained_embedding_tied_to_the_output_layer_is_refused_by_name():
    model = small_llama(tied=True)
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    refused(model, r"embed_tokens: its weight is shared")


def test_a_layer_with_running_statistics_is_refused_by_name():
    model = toy()
    model.base_model.model.normalise = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    refused(model, "normalise: no exact per-sample gradient for its weight, bias")


def test_batch_normalisation_is_refused_even_frozen():
    model = toy()
    model.base_model.model.normalise = nn.BatchNorm1d(3).requires_grad_(False)
    refused(model, "normalise: batch normalisation")


def test_parameters_trained_in_reduced_precision_are_refused():
    model = toy()
    model.base_model.model.first.lora_A.bfloat16()
    refused(model, "lora_A.default.weight: trained in bfloat16")


def test_other_product_types_are_refused():
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        attach(toy(), dtype=torch.float16)


def test_without_privacy_nothing_is_refused():
    model = adapted(small_bert, ["query"], ["classifier"], use_dora=True)
    attached = attach(model, private=False)
    classify(model, text_batch()).sum().backward()
    assert all(p.grad is not None for p in attached.parameters.values())


def test_bfloat16_products_stay_close_and_keep_float32_outside():
    torch.manual_seed(0)
    model = toy(Shape(width=128, rank=4, twice=True))
    batch = sequences(6)
    truth = alone(model, batch)
    attached = attach(model, dtype=torch.bfloat16)
    losses = toy_losses(model, batch)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    # bfloat16 has 8 significant bits: 2^-8 = 0.4 % a product, a few of them in a row.
    assert 1e-5 < worst_error(attached, truth) < 0.05
    assert "bfloat16 products" in attached.description


def test_one_input_is_converted_once():
    cast = InputCast(torch.bfloat16)
    x = torch.randn(3)
    first = cast.get(x)
    assert cast.get(x) is first
    x.add_(1)
    torch.testing.assert_close(cast.get(x), x.bfloat16())
    other = x.clone()
    assert cast.get(other) is not first
    with torch.inference_mode():
        inside = torch.randn(3)
        torch.testing.assert_close(cast.get(inside), inside.bfloat16())
    exact = torch.randn(3).bfloat16()
    assert cast.get(exact) is exact


def test_bfloat16_products_cover_frozen_layers_and_follow_their_weights():
    model = adapted(small_llama, ["q_proj"], None).eval()
    big = nn.Linear(120, 120).requires_grad_(False)
    model.add_module("big", big)
    x = torch.randn(3, 120, requires_grad=True)
    attach(model, dtype=torch.bfloat16)
    for _ in range(2):
        expected = F.linear(x, big.weight, big.bias)
        found = big(x)
        assert 0 < float((found - expected).detach().abs().max()) < 0.05
        with torch.no_grad():
            big.weight.mul_(-3)
    found.sum().backward()
    assert x.grad.dtype == torch.float32
