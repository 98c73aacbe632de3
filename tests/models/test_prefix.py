"""The cached prefix stands in for the frozen layers without changing what comes out."""

import numpy as np
import pytest
import torch

from silotune.models.base import load_model
from silotune.models.features import Frozen, PrefixCache, compute_frozen
from silotune.privacy.clipping import attach
from tests.models.model_material import CORPUS, a_plan

EXAMPLES = [{"text": text, "label": "no"} for text in CORPUS]


ANSWERS = [{"prompt": text, "response": text[::2]} for text in CORPUS]


def loaded(folder, task="text_classification", examples=EXAMPLES, **settings):
    model = load_model(a_plan(folder, task, model__pooling="last", **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # B and the head start at zero, which hides mistakes
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, model.task.encode(examples, model.tokenizer, plan=model.plan)


@pytest.mark.parametrize(
    ("backbone", "task", "examples"),
    [
        ("bert_folder", "text_classification", EXAMPLES),
        ("llama_folder", "text_classification", EXAMPLES),
        ("llama_folder", "causal_lm", ANSWERS),
    ],
)
@pytest.mark.parametrize("attached", [False, True])
def test_losses_and_gradients_are_those_of_the_whole_model(
    backbone, task, examples, attached, request
):
    folder = request.getfixturevalue(backbone)
    model, encoded = loaded(folder, task, examples, lora__last_layers=1)
    if attached:
        attach(model.module, private=False)
    frozen = compute_frozen(model, encoded)
    assert frozen.prefix is not None
    rows = [3, 0, 5]
    found = []
    for inputs in (
        model.task.collate(encoded, rows, model.device),
        frozen.inputs(model, encoded, rows),
    ):
        for parameter in model.parameters():
            parameter.grad = None
        losses = model.task.losses(model.module, inputs)
        losses.sum().backward()
        found.append([losses.detach(), *(p.grad.clone() for p in model.parameters())])
    for whole, cached in zip(*found, strict=True):
        assert whole.any()
        torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-6)


def test_the_frozen_layers_are_not_run(bert_folder):
    model, encoded = loaded(bert_folder, lora__last_layers=1)
    frozen = compute_frozen(model, encoded)
    with torch.no_grad():
        for name, parameter in model.module.peft.named_parameters():
            if ".layer.0." in name or ".layer.1." in name:
                parameter.fill_(float("nan"))
    with model.module.inference():
        inputs = frozen.inputs(model, encoded, [0, 1])
        assert torch.isfinite(model.module(inputs)).all()


def test_the_frozen_layers_of_a_language_model_are_not_run(llama_folder):
    model, encoded = loaded(llama_folder, "causal_lm", ANSWERS, lora__last_layers=1)
    frozen = compute_frozen(model, encoded)
    with torch.no_grad():
        for name, parameter in model.module.peft.named_parameters():
            if ".layers.0." in name:
                parameter.fill_(float("nan"))
    with model.module.inference():
        inputs = frozen.inputs(model, encoded, [0, 1])
        assert torch.isfinite(model.task.losses(model.module, inputs)).all()
        plain = model.task.collate(encoded, [0, 1], model.device)
        assert not torch.isfinite(model.task.losses(model.module, plain)).any()


def test_without_frozen_layers_below_the_adapter_there_is_no_cache(bert_folder):
    model, encoded = loaded(bert_folder)
    assert model.module.prefix is None
    frozen = compute_frozen(model, encoded)
    assert frozen.prefix is None
    assert "prefix" not in frozen.inputs(model, encoded, [0])


def test_a_failed_pass_does_not_leave_the_cache_in_force(bert_folder):
    model, encoded = loaded(bert_folder, lora__last_layers=1)
    frozen = compute_frozen(model, encoded)
    plain = model.task.collate(encoded, [0, 1], model.device)
    with model.module.inference():
        want = model.module(plain)
        broken = {**frozen.inputs(model, encoded, [0, 1]), "attention_mask": torch.ones(9, 9)}
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            model.module(broken)
        torch.testing.assert_close(model.module(plain), want)


def test_what_is_kept_comes_back_padded_with_zeros(bert_folder):
    _, encoded = loaded(bert_folder)
    cache = PrefixCache(encoded, size=2)
    longest = int(encoded.lengths.max())
    for row in range(len(encoded)):
        cache.put([row], torch.full((1, longest, 2), float(row + 1)))
    got = cache.get([4, 1], torch.device("cpu")).numpy()
    lengths = encoded.lengths[[4, 1]]
    want = np.where(np.arange(lengths.max())[None] < lengths[:, None], [[5.0], [2.0]], 0.0)
    assert (got == want[..., None]).all()


def test_records_beyond_the_memory_bound_are_not_kept(bert_folder, monkeypatch):
    model, encoded = loaded(bert_folder, lora__last_layers=1)
    monkeypatch.setattr("silotune.models.features._MOST_BYTES", 1000)
    assert compute_frozen(model, encoded).prefix is None


def test_frozen_features_survive_a_trip_through_a_file(bert_folder, tmp_path):
    model, encoded = loaded(bert_folder, lora__last_layers=1)
    frozen = compute_frozen(model, encoded)
    frozen.save(tmp_path / "shared" / "one.safetensors")
    again = Frozen.load(tmp_path / "shared" / "one.safetensors", encoded)
    assert torch.equal(again.features, frozen.features)
    rows = [2, 4]
    for name, tensor in frozen.inputs(model, encoded, rows).items():
        assert torch.equal(again.inputs(model, encoded, rows)[name], tensor)
    with pytest.raises(ValueError, match="expected states"):
        Frozen.load(tmp_path / "shared" / "one.safetensors", encoded.subset([0]))
