"""A model is tried on public texts before records: what breaks a promise is refused and named.

The models are tiny random ones of many architectures; nothing in the product knows their names.
"""

import numpy as np
import pytest
import torch
import transformers as hf

from silotune.errors import (
    LayerUnsupported,
    LengthRefused,
    ModelError,
    RecordsMixed,
    TargetModulesUnknown,
    TextRefused,
    TokensSeenEarly,
)
from silotune.models import trial
from silotune.models.adapter import read_adapter
from silotune.models.base import load_model
from silotune.models.features import compute_frozen
from tests.models.architectures import ARCHITECTURES
from tests.models.model_material import CORPUS, a_plan, trained_tokenizer

SHAPES = {architecture.config: architecture.shape for architecture in ARCHITECTURES}
PRIVATE = {
    "plan__seed": None,
    "privacy__mode": "record",
    "privacy__epsilon": 8.0,
    "privacy__delta": 1e-5,
    "privacy__clip": 1.0,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes a folder with a random model of an architecture, once."""
    made = {}

    def folder(kind: str, task: str = "text_classification", *, vocabulary: int = 0):
        key = (kind, task, vocabulary)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("model")
            tokenizer = trained_tokenizer()
            tokenizer.pad_token, tokenizer.model_max_length = "</s>", 100_000
            size = vocabulary or len(tokenizer)
            config = getattr(hf, f"{kind}Config")(vocab_size=size, **SHAPES[kind])
            auto = hf.AutoModelForCausalLM if task == "causal_lm" else hf.AutoModel
            with torch.random.fork_rng():
                torch.manual_seed(3)
                auto.from_config(config).save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return folder


def load(folder, task="text_classification", **settings):
    """Load under a private plan."""
    plan = a_plan(folder, task, **{**PRIVATE, **settings})
    return load_model(plan, attention="eager", dtype="float32")


GOOD = [
    ("Bert", "text_classification"),
    ("Roberta", "text_classification"),
    ("DistilBert", "text_classification"),
    ("Electra", "text_classification"),
    ("ModernBert", "text_classification"),
    ("DebertaV2", "text_classification"),
    ("Deberta", "text_classification"),
    ("RemBert", "text_classification"),
    ("Llama", "text_classification"),
    ("Llama", "causal_lm"),
    ("Gemma2", "causal_lm"),
    ("GPT2", "causal_lm"),
    ("GPTNeoX", "causal_lm"),
    ("GPTNeo", "causal_lm"),
    ("OPT", "causal_lm"),
    ("Mamba", "causal_lm"),
]


@pytest.mark.parametrize(("kind", "task"), GOOD)
def test_a_good_model_stands_the_trial_by_a_wide_margin(saved, kind, task, monkeypatch):
    monkeypatch.setattr(trial, "_AGREE", 2e-5)
    monkeypatch.setattr(trial, "_KNOWN", {})
    assert load(saved(kind, task), task).layout.size > 0


@pytest.mark.parametrize(
    ("kind", "where", "settings"),
    [
        ("BigBird", "", {"data__max_length": 64}),
        ("ConvBert", "layer encoder.layer.0.attention", {}),
        ("FNet", "layer encoder.layer.0.fourier", {"lora__target_modules": "all-linear"}),
    ],
)
def test_a_model_whose_rows_depend_on_each_other_is_refused(
    saved, kind, where, settings, monkeypatch
):
    # Not by rounding: BigBird is off by .0012 to .0056 in 42 loads, whose heads are drawn anew.
    monkeypatch.setattr(trial, "_AGREE", 3 * trial._AGREE)
    monkeypatch.setattr(trial, "_KNOWN", {})
    with pytest.raises(RecordsMixed, match="changed by") as caught:
        load(saved(kind), **settings)
    assert where in caught.value.detail


def test_such_a_model_may_be_trained_without_privacy(saved):
    none = {key: None for key in PRIVATE if key != "privacy__mode"}
    assert load(saved("ConvBert"), **none, privacy__mode="none").layout.size > 0


@pytest.mark.parametrize(
    ("kind", "task", "bad", "good"),
    [
        ("Longformer", "text_classification", "key, key_global, query", ["dense"]),
        ("Deberta", "text_classification", "pos_proj, pos_q_proj", ["dense", "in_proj"]),
        ("DebertaV2", "text_classification", "key_proj, query_proj", ["dense", "value_proj"]),
        ("OPT", "causal_lm", "fc1, fc2", ["k_proj", "out_proj", "q_proj", "v_proj"]),
    ],
)
def test_layers_without_gradients_of_single_records_are_named_with_those_that_have(
    saved, kind, task, bad, good
):
    with pytest.raises(LayerUnsupported) as caught:
        load(saved(kind, task), task, lora__target_modules="all-linear")
    assert f"in {bad}" in caught.value.detail
    assert load(saved(kind, task), task, lora__target_modules=good).layout.size > 0
    if kind != "Longformer":
        assert f"lora.target_modules = {good}" in caught.value.remedy


@pytest.mark.parametrize("kind", ["Mamba", "SqueezeBert"])
def test_what_has_no_layer_for_an_adapter_is_told(saved, kind):
    task = "causal_lm" if kind == "Mamba" else "text_classification"
    with pytest.raises(TargetModulesUnknown, match=r"out_proj|no linear layer"):
        load(saved(kind, task), task, lora__target_modules="all-linear")


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_an_encoder_given_as_causal_lm_is_refused(saved, kind):
    """Saved with its head of masked language modelling, so that no weight is missing."""
    with pytest.raises(TokensSeenEarly, match=r"layer .*encoder\.layer\.0\.attention"):
        load(saved(kind, "causal_lm"), "causal_lm")


@pytest.mark.parametrize(
    "kind", ["Bloom", "DebertaV2", "Deberta", "GPTJ", "GPTNeo", "RemBert", "XLM", "Bert", "Llama"]
)
def test_a_prefix_agrees_with_the_whole_model_or_is_not_used(saved, kind):
    model = load(saved(kind), lora__last_layers=1, model__pooling="last")
    assert (model.module.prefix is not None) == (kind in {"Bert", "Llama"})
    data = model.task.encode(
        [{"text": text, "label": "yes"} for text in CORPUS], model.tokenizer, plan=model.plan
    )
    frozen, rows = compute_frozen(model, data), [3, 0, 5]
    with torch.no_grad():
        cached = model.task.losses(model.module, frozen.inputs(model, data, rows))
        whole = model.task.losses(model.module, model.task.collate(data, rows, model.device))
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GPT2", "GPTNeo", "OPT", "Bloom"])
def test_the_same_holds_of_a_language_models_prefix(saved, kind):
    model = load(saved(kind, "causal_lm"), "causal_lm", lora__last_layers=1)
    data = model.task.encode(
        [{"prompt": text, "response": text[::2]} for text in CORPUS],
        model.tokenizer,
        plan=model.plan,
    )
    frozen, rows = compute_frozen(model, data), [3, 0, 5]
    assert (frozen.prefix is not None) == (kind in {"Llama", "Gemma2", "GPT2", "OPT"})
    with torch.no_grad():
        cached = model.task.losses(model.module, frozen.inputs(model, data, rows))
        whole = model.task.losses(model.module, model.task.collate(data, rows, model.device))
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)


def test_positions_are_counted_as_the_model_counts_them(saved):
    """A RoBERTa of 130 positions begins behind that of padding, 1: it takes 128 tokens."""
    load(saved("Roberta"), data__max_length=128)
    with pytest.raises(LengthRefused, match="is 129, the model takes 128 tokens"):
        load(saved("Roberta"), data__max_length=129)


def test_a_limit_that_no_setting_states_is_found_by_trying(saved, monkeypatch):
    monkeypatch.setattr("silotune.models.base.require_length", lambda *args: None)
    with pytest.raises(LengthRefused, match="is 200, the model takes 128 tokens and fails on more"):
        load(saved("Roberta"), data__max_length=200)


def test_minus_one_position_means_no_limit(saved):
    none = {key: None for key in PRIVATE if key != "privacy__mode"}
    settings = {**none, "privacy__mode": "none", "lora__target_modules": "all-linear"}
    assert load(saved("XLNet"), **settings, data__max_length=300).layout.size > 0


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers(saved):
    with pytest.raises(TextRefused, match="ids up to 319, the model has embeddings for 300 tokens"):
        load(saved("Bert", vocabulary=300))


def test_an_image_model_is_refused(tmp_path):
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    hf.AutoModel.from_config(config).save_pretrained(tmp_path)
    trained_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(TextRefused, match="a vit model takes pixel_values, not token ids"):
        load(tmp_path)


def test_what_a_library_raises_is_told_with_the_layers_name(saved, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr("transformers.models.bert.modeling_bert.BertIntermediate.forward", fail)
    monkeypatch.setattr(trial, "_KNOWN", {})
    with pytest.raises(TextRefused, match=r"in layer encoder\.layer\.0\.intermediate: boom"):
        load(saved("Bert"))


def test_the_trial_leaves_everything_as_it_was(saved, monkeypatch):
    monkeypatch.setattr(trial, "_KNOWN", {})
    plan = a_plan(saved("Bert"), **PRIVATE, lora__dropout=0.3)
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    tried = load_model(plan, attention="eager", dtype="float32")
    fresh = load_model(plan, attention="eager", dtype="float32", trial=False)
    assert np.array_equal(read_adapter(tried), read_adapter(fresh))
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in tried.parameters())
    assert not any(hasattr(p, "grad_sample") for p in tried.parameters())
    assert all(m.training for m in tried.module.modules())


def test_a_process_tries_a_model_once_for_plans_alike(saved, monkeypatch):
    monkeypatch.setattr(trial, "_KNOWN", {})
    tried = []
    real = trial._tried
    monkeypatch.setattr(trial, "_tried", lambda model: tried.append(1) or real(model))
    for settings in ({}, {"privacy__epsilon": 2.0, "lora__r": 4}, {"rounds__number": 3}):
        load(saved("Bert"), **settings)
    assert len(tried) == 1
    load(saved("Bert"), data__max_length=64)
    assert len(tried) == 2
    for _ in range(2):
        with pytest.raises(ModelError):
            load(saved("ConvBert"))
    assert len(tried) == 3
