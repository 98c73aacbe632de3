"""Features computed once: those of the base model, whatever the adapter holds."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from silotune.models.adapter import read_adapter, write_adapter
from silotune.models.base import load_model
from silotune.models.features import compute_frozen
from silotune.privacy.clipping import attach
from tests.models.model_material import CORPUS, a_plan

EXAMPLES = [
    {"text": text, "label": label}
    for text, label in zip(CORPUS, ["no", "yes", "yes", "no", "perhaps", "no"], strict=True)
]


@pytest.fixture
def model(bert_folder):
    return load_model(a_plan(bert_folder, aggregation__strategy="ffa", model__centre_texts=["eye"]))


@pytest.fixture
def encoded(model):
    return model.task.encode(EXAMPLES, model.tokenizer, plan=model.plan)


def test_features_are_those_of_a_model_with_a_fresh_adapter(model, encoded):
    batch = model.task.collate(encoded, range(len(encoded)), model.device)
    with model.module.inference():
        fresh = model.module.features(batch)
    found = compute_frozen(model, encoded, batch=2).features
    assert found.shape == (len(CORPUS), 32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, fresh, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attached", [False, True])
def test_the_adapter_has_no_effect_and_is_as_before_afterwards(model, encoded, attached):
    clean = compute_frozen(model, encoded).features
    if attached:
        attach(model.module, private=True)
    flat = np.random.default_rng(0).normal(size=model.layout.size).astype(np.float32)
    write_adapter(model, flat)
    wanted = [p.requires_grad for p in model.module.parameters()]
    torch.testing.assert_close(compute_frozen(model, encoded).features, clean, rtol=1e-5, atol=1e-6)
    assert np.array_equal(read_adapter(model), flat)
    assert [p.requires_grad for p in model.module.parameters()] == wanted
    assert model.module.training


def test_an_error_midway_still_puts_the_adapter_back(model, encoded, monkeypatch):
    flat = np.ones(model.layout.size, np.float32)
    write_adapter(model, flat)

    def fail(batch):
        raise RuntimeError

    monkeypatch.setattr(model.module, "features", fail)
    with pytest.raises(RuntimeError):
        compute_frozen(model, encoded)
    assert np.array_equal(read_adapter(model), flat)


def test_head_losses_and_scores_from_features_equal_the_whole_models(model, encoded):
    head = np.random.default_rng(1).normal(size=model.layout.size).astype(np.float32)
    head[: -sum(span.size for span in model.layout.spans({"head"}))] = (
        0  # the whole model is then the base and the head
    )
    write_adapter(model, head)
    features, rows = compute_frozen(model, encoded).features, [4, 0, 3]
    whole = model.task.losses(model.module, model.task.collate(encoded, rows, model.device))
    alone = model.task.head_losses(model.module, features[rows], encoded, rows)
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)
    counts = model.task.score(model.module, model.task.collate(encoded, rows, model.device))
    assert np.array_equal(
        counts, model.task.head_score(model.module, features[rows], encoded, rows)
    )


def test_the_heads_gradient_is_the_closed_form(model, encoded):
    features = compute_frozen(model, encoded).features
    model.task.head_losses(model.module, features, encoded, range(len(encoded))).sum().backward()
    head = model.module.head
    onehot = torch.nn.functional.one_hot(torch.from_numpy(encoded.targets), 3).float()
    error = torch.full((len(encoded), 3), 1 / 3) - onehot  # the head is at zero
    torch.testing.assert_close(head.weight.grad, error.t() @ features)
    torch.testing.assert_close(head.bias.grad, error.sum(0))
    assert cross_entropy(features @ head.weight.t(), torch.from_numpy(encoded.targets)) > 0


def test_no_examples_have_no_features(model, encoded):
    assert compute_frozen(model, encoded.subset([])).features.shape == (0, 32)
