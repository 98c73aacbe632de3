"""Image classification: gradients of single records on every backbone, batch norms, cards, refusals."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from silotune.errors import (
    LayerUnsupported,
    ModelError,
    PlanInvalid,
    RecordInvalid,
    SelfCheckFailed,
)
from silotune.models.adapter import load_adapter, save_adapter
from silotune.models.base import load_model, outline
from silotune.models.features import compute_frozen
from silotune.models.images import drawn
from silotune.privacy.clipping import attach
from silotune.privacy.engine import ClipGroup, DpSgd
from tests.image_material import PRIVATE, image_plan, spread, write_image_model, write_scans

HEAD = {"lora__target_modules": "none"}
# Of each kind the parts that an adapter is on; a convolutional net with batch norms has a head only.
KINDS = {
    "vit": ["q_proj", "v_proj"],
    "deit": ["q_proj", "v_proj"],
    "dinov2": ["q_proj", "v_proj"],
    "swin": ["fc1", "fc2"],
    "convnext": ["pwconv1", "pwconv2"],
    "resnet": [],
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def make(kind):
        return write_image_model(tmp_path_factory.mktemp(kind), kind)

    return make


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    return [str(folder / name) for name in write_scans(folder, 9)]


def examples(scans):
    return [
        {"image": path, "label": ["no", "yes", "perhaps"][n % 3]} for n, path in enumerate(scans)
    ]


def loaded(folder, kind, **settings):
    settings |= {} if KINDS[kind] else HEAD
    model = load_model(image_plan(folder, **PRIVATE, **settings))
    spread(model)
    return model


def one_by_one(model, encoded, rows):
    """Autograd's gradients of single records, by PEFT's own layers."""
    found = []
    for row in rows:
        for parameter in model.parameters():
            parameter.grad = None
        batch = model.task.collate(encoded, [row], model.device)
        model.task.losses(model.module, batch).sum().backward()
        found.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
        for parameter in model.parameters():
            parameter.grad = None
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clipped_sum_over_units_is_that_of_autograd_one_by_one(kind, folder_of, scans):
    """Three units of unequal size in two micro-batches; dropout and stochastic depth are off."""
    model = loaded(folder_of(kind), kind)
    names = [entry.name for entry in model.layout.entries if ".lora_" in entry.name]
    leaves = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    assert sorted(leaves) == KINDS[kind]
    encoded = model.task.encode(examples(scans), model.tokenizer, plan=model.plan)
    parts = [([0, 1, 4], [0, 0, 1]), ([7, 8, 2], [0, 0, 0])]
    units = [[0, 1], [4], [7, 8, 2]]
    alone = one_by_one(model, encoded, range(9))
    sums = [alone[rows].sum(0) for rows in units]
    clip = 0.7 * float(torch.stack([total.norm() for total in sums]).median())
    expected = sum(total * min(1.0, clip / float(total.norm())) for total in sums)
    attached = attach(model.module)
    group = ClipGroup(name="all", parameters=model.parameters(), clip=clip, share=1.0)
    engine = DpSgd(attached, [group], sigma=1.0, noise=None)
    for rows, numbers in parts:
        batch = model.task.collate(encoded, rows, model.device)
        losses = model.task.losses(model.module, batch)
        engine.accumulate(losses, units=torch.tensor(numbers), n_units=max(numbers) + 1)
    found = torch.cat([part.flatten() for part in engine.release()]).float()
    assert float(expected.norm()) > 0.1 * clip
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_head_rounds_on_features_computed_once_are_the_whole_models(kind, folder_of, scans):
    model = loaded(folder_of(kind), kind)
    encoded = model.task.encode(examples(scans), model.tokenizer, plan=model.plan)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
    frozen, rows = compute_frozen(model, encoded, batch=4), [5, 0, 3]
    with torch.no_grad():
        whole = model.task.losses(model.module, model.task.collate(encoded, rows, model.device))
        head = model.task.head_losses(model.module, frozen.features[rows], encoded, rows)
    torch.testing.assert_close(head, whole, rtol=1e-4, atol=1e-5)


# --- batch normalisation ---


def test_batch_norms_stay_still_whatever_mode_is_asked_for(folder_of):
    model = loaded(folder_of("resnet"), "resnet")
    norms = [layer for layer in model.module.modules() if isinstance(layer, nn.BatchNorm2d)]
    before = [layer.running_mean.clone() for layer in norms]
    for _ in range(2):
        model.module.train()
        assert model.module.training
        assert not any(layer.training for layer in norms)
        with model.module.inference():
            pass
    few = [model.task.example("", number=n, plan=model.plan) for n in range(4)]
    encoded = model.task.encode(few, model.tokenizer, plan=model.plan)
    model.module(model.task.collate(encoded, range(4), model.device))
    for layer, mean in zip(norms, before, strict=True):
        assert torch.equal(layer.running_mean, mean)


def test_a_batch_norm_in_training_mode_is_refused_and_stops_a_step(folder_of, scans):
    model = loaded(folder_of("resnet"), "resnet")
    encoded = model.task.encode(examples(scans), model.tokenizer, plan=model.plan)
    norm = next(layer for layer in model.module.modules() if isinstance(layer, nn.BatchNorm2d))
    norm.training = True
    with pytest.raises(LayerUnsupported, match="mixes the records"):
        attach(model.module)
    norm.training = False
    attached = attach(model.module)
    norm.training = True
    model.task.losses(
        model.module, model.task.collate(encoded, [0, 1], model.device)
    ).sum().backward()
    with pytest.raises(SelfCheckFailed, match="batch normalisation"):
        attached.check_gradients(model.parameters(), 2)


def test_a_batch_norm_without_statistics_of_its_own_is_refused():
    net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False, affine=False), nn.Linear(3, 2))
    with pytest.raises(LayerUnsupported, match="mixes the records"):
        attach(net.eval())


def test_a_net_of_convolutions_alone_says_that_its_head_can_be_trained(folder_of):
    with pytest.raises(ModelError, match="no linear layer") as caught:
        load_model(image_plan(folder_of("resnet")))
    assert "'none'" in caught.value.remedy


# --- the adapter's folder ---


COSINES = {"kind": "cosines", "number": 16, "scale": 1.5}


@pytest.mark.parametrize("kind, features", [("vit", None), ("convnext", COSINES), ("resnet", None)])
def test_the_cards_own_code_gives_our_labels(
    kind, features, folder_of, scans, tmp_path, monkeypatch
):
    """With Transformers, PEFT and Pillow alone; what was saved is read back."""
    settings = {"model__head_features": features} if features else {}
    model = loaded(folder_of(kind), kind, **settings)
    flat = model.layout.pack(model.module.trained)
    save_adapter(model, flat, tmp_path, plan=model.plan)
    assert np.array_equal(load_adapter(model, tmp_path), flat)
    assert (tmp_path / "adapter_config.json").exists() == bool(KINDS[kind])
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    room = {}
    exec(code, room)
    encoded = model.task.encode(examples(scans), model.tokenizer, plan=model.plan)
    with model.module.inference():
        ours = model.module(model.task.collate(encoded, range(9), model.device))
    assert float(ours.std(0).min()) > 0
    torch.testing.assert_close(room["logits"](scans), ours, rtol=0.02, atol=0.02)


# --- refusals ---


def test_a_model_of_texts_is_no_model_of_images_and_the_other_way_round(bert_folder, folder_of):
    (bert_folder / "preprocessor_config.json").write_text(
        (folder_of("vit") / "preprocessor_config.json").read_text()
    )
    try:
        with pytest.raises(ModelError, match="a bert model takes input_ids, not images"):
            outline(image_plan(bert_folder), base=str(bert_folder))
    finally:
        (bert_folder / "preprocessor_config.json").unlink()


def test_a_class_token_is_asked_of_models_that_have_one(folder_of):
    assert load_model(image_plan(folder_of("vit"), model__pooling="first")).layout.size
    with pytest.raises(ModelError, match="a swin model has no class token"):
        load_model(image_plan(folder_of("swin"), model__pooling="first"))


@pytest.mark.parametrize(
    "key, value",
    [("model.pooling", "last"), ("model.centre_texts", ["a", "b", "c"])],
)
def test_what_means_nothing_for_images_is_refused_in_the_plan(key, value, folder_of):
    with pytest.raises(PlanInvalid, match=key):
        image_plan(folder_of("vit")).override({key: value})


def test_without_an_adapter_a_causal_language_model_has_nothing_to_train(llama_folder):
    from tests.models.model_material import a_plan

    with pytest.raises(PlanInvalid, match=r"lora.target_modules: causal_lm has no head"):
        a_plan(llama_folder, "causal_lm", lora__target_modules="none")


def test_an_image_that_can_not_be_read_is_told_by_its_place_alone(folder_of, tmp_path):
    model = loaded(folder_of("vit"), "vit")
    (tmp_path / "secret.png").write_bytes(b"no image")
    with pytest.raises(RecordInvalid, match="image 1 of 1") as caught:
        model.task.predict(model, [{"image": str(tmp_path / "secret.png")}])
    assert "secret" not in str(caught.value)


def test_public_pictures_are_the_same_on_every_machine():
    """A sum over their bytes, as it was when they were first drawn."""
    assert int(sum(drawn(n).astype(np.int64).sum() * (n + 1) for n in range(24))) == 416_182_325
