"""Random cosines under the head: one and the same everywhere, public, saved with the head."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from silotune.errors import AdapterMismatch, ModelError, PlanInvalid
from silotune.models.adapter import load_adapter, save_adapter, write_adapter
from silotune.models.base import load_model, outline
from silotune.models.cosines import Cosines, drawn
from silotune.models.features import compute_frozen
from silotune.models.layout import initial_adapter
from silotune.plan.plan import Plan, plan_in_words
from tests.golden.registry import GOLDEN as GOLDEN_FILES
from tests.models.model_material import TEXTS, a_plan
from tests.models.test_adapter import random_flat, run_card

PLANS = GOLDEN_FILES / "plans"
PUBLIC = ["eye", "acute injury", "diabetes", "fracture of the femur"]
COSINES = {"kind": "cosines", "number": 24, "scale": 1.5}
GOLDEN = {
    "secure": "6ecc4ead4343b9ccfabf475f55b2c6a7e417da81678d4da3490bda88cfc18c93",
    "bare": "00734efa450013610e65a62ea9e19d8de60da76b159503e062479be3ff5aa728",
}  # with a seed, and from the plan's hash


def plan_with(base, *, number=24, **more):
    chosen = {**COSINES, "number": number}
    return a_plan(base, **{"model__head_features": chosen, "model__centre_texts": PUBLIC, **more})


@pytest.fixture(scope="module")
def model(bert_folder):
    return load_model(plan_with(bert_folder))


@pytest.mark.parametrize("name", GOLDEN)
def test_they_are_those_of_an_earlier_build(name):
    """Sites of several versions train one head: these bytes never change."""
    signed = json.loads((PLANS / f"{name}.signed.json").read_text())
    plan = Plan.from_canonical(signed["plan"])
    frequencies, phases = drawn(plan, number=5, hidden=6)
    found = hashlib.sha256(frequencies.tobytes() + phases.tobytes()).hexdigest()
    assert found == GOLDEN[name]


def test_they_are_what_the_page_says():
    """Bit by bit as the docstring derives them, without NumPy."""
    plan = a_plan("x", plan__seed=None)
    raw = hashlib.shake_256(b"silotune cosines v1\0plan " + plan.sha256.encode()).digest(
        8 * 6 + 4 * 3
    )
    ones = [int.from_bytes(raw[8 * i : 8 * i + 8], "little").bit_count() for i in range(6)]
    turns = [int.from_bytes(raw[48 + 4 * i :][:4], "little") >> 8 for i in range(3)]
    frequencies, phases = drawn(plan, number=3, hidden=2)
    assert frequencies.flatten().tolist() == [(count - 32) / 4 for count in ones]
    assert phases.tolist() == [np.float32(turn / 2**24 * (2 * math.pi)) for turn in turns]


def test_frequencies_are_normal_and_phases_uniform():
    frequencies, phases = drawn(a_plan("x"), number=2000, hidden=50)
    values = np.sort(frequencies.ravel())
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert np.quantile(values, [0.025, 0.16]) == pytest.approx([-2, -1], abs=0.05)
    assert np.quantile(phases, [0.25, 0.5, 0.75]) == pytest.approx(
        [math.pi / 2, math.pi, 1.5 * math.pi], abs=0.2
    )


def test_inner_products_are_the_gaussian_kernel_of_the_distance():
    plan = plan_with("x", number=20_000)
    cosines = Cosines.of(plan, hidden=16)
    points = torch.nn.functional.normalize(
        torch.from_numpy(np.random.default_rng(1).normal(size=(6, 16))).float(), dim=1
    )
    found = cosines(points * 4.0)
    kernel = torch.exp(-((1.5 * torch.cdist(points, points)) ** 2) / 2) * 4.0**2
    torch.testing.assert_close(found @ found.T, kernel, atol=0.4, rtol=0)


def test_distances_are_measured_in_the_median_one_of_the_public_texts(model):
    """So that one scale suits base models whose embeddings lie close together, and others."""
    module, plan = model.module, model.plan
    encoded = model.task.encode(
        [{"text": text, "label": "no"} for text in PUBLIC], model.tokenizer, plan=plan
    )
    with module.inference():
        public = module.embed(encoded.padded(range(len(PUBLIC)), model.device))
    gaps = sorted((a - b).norm().item() for i, a in enumerate(public) for b in public[:i])
    frequencies, _ = drawn(plan, number=24, hidden=32)
    expected = frequencies * 1.5 / 4.0 / gaps[2]  # the lower of the two in the middle
    torch.testing.assert_close(module.cosines.frequencies, torch.from_numpy(expected))


def test_public_texts_that_a_model_cannot_tell_apart_are_refused(bert_folder):
    with pytest.raises(ModelError, match="can't tell these texts apart"):
        load_model(plan_with(bert_folder, model__centre_texts=["eye", "eye", "eye"]))


def test_the_head_and_nothing_else_has_their_width(model, bert_folder):
    shapes = {entry.name: entry.shape for entry in model.layout.entries}
    plain = {e.name: e.shape for e in load_model(a_plan(bert_folder)).layout.entries}
    assert shapes == plain | {"head.weight": (3, 24)}
    assert outline(model.plan, base=str(bert_folder)) == model.layout
    assert not {name for name in model.module.trained if "cosines" in name}


def test_head_only_rounds_and_whole_ones_compute_the_same(model):
    write_adapter(model, initial_adapter(model.layout, model.plan))
    with torch.no_grad():
        model.module.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    examples = [{"text": text, "label": "yes"} for text in TEXTS]
    encoded = model.task.encode(examples, model.tokenizer, plan=model.plan)
    frozen = compute_frozen(model, encoded)
    assert frozen.features.shape == (len(TEXTS), 32)
    rows = list(range(len(TEXTS)))
    with model.module.inference():
        head = model.task.head_losses(model.module, frozen.features, encoded, rows)
        whole = model.task.losses(model.module, model.task.collate(encoded, rows, model.device))
    torch.testing.assert_close(head, whole, rtol=1e-4, atol=1e-5)


def test_the_card_loads_them_with_transformers_and_peft_alone(model, tmp_path, monkeypatch):
    flat = random_flat(model.layout)
    save_adapter(model, flat, tmp_path, plan=model.plan)
    write_adapter(model, flat)
    assert np.array_equal(load_adapter(model, tmp_path), flat)
    assert "24 fixed random cosines" in (tmp_path / "README.md").read_text()
    card = run_card(tmp_path, monkeypatch)
    found = model.task.predict(model, [{"text": text} for text in TEXTS])
    shares = torch.tensor([list(p.probabilities.values()) for p in found])
    torch.testing.assert_close(card["logits"](TEXTS).softmax(1), shares, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"plan.seed": 8}, "lora_A|frequencies"),
        ({"model.head_features.scale": 1.0}, "head_features"),
        ({"model.head_features": None}, "frequencies|unknown"),
    ],
)
def test_a_head_on_other_cosines_is_refused(model, tmp_path, changes, named):
    save_adapter(model, random_flat(model.layout), tmp_path, plan=model.plan)
    with pytest.raises(AdapterMismatch, match=named):
        load_adapter(load_model(model.plan.override(changes)), tmp_path)


def test_a_damaged_file_of_them_is_refused(model, tmp_path):
    save_adapter(model, random_flat(model.layout), tmp_path, plan=model.plan)
    arrays = load_file(tmp_path / "head.safetensors")
    arrays["phases"][3] += 0.5
    save_file(arrays, tmp_path / "head.safetensors")
    with pytest.raises(AdapterMismatch, match="phases"):
        load_adapter(model, tmp_path)


def test_the_plan_says_them_and_keeps_its_text_without_them():
    assert "head_features" not in a_plan("x").canonical()
    with_them = plan_with("x")
    assert Plan.from_canonical(with_them.canonical()) == with_them
    assert "through 24 fixed random cosines (scale 1.5)" in dict(plan_in_words(with_them))["Model"]
    with pytest.raises(PlanInvalid, match=r"model\.head_features: causal_lm has no head"):
        a_plan("x", "causal_lm", model__head_features=COSINES)
    with pytest.raises(PlanInvalid, match=r"model\.centre_texts: at least 3"):
        plan_with("x", model__centre_texts=["eye", "ear"])
