"""Tiny random models of images, and folders of images, for tests."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModel,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from silotune.models.images import drawn
from silotune.plan.plan import Plan

SIDE = 32
_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}
_DROPPED = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
CONFIGS = {
    "vit": lambda: ViTConfig(intermediate_size=48, **_SMALL, **_DROPPED),
    "deit": lambda: DeiTConfig(intermediate_size=48, **_SMALL, **_DROPPED),
    "dinov2": lambda: Dinov2Config(mlp_ratio=2, drop_path_rate=0.4, **_SMALL),
    "swin": lambda: SwinConfig(
        embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, image_size=SIDE, patch_size=2,
        drop_path_rate=0.4,
    ),
    "convnext": lambda: ConvNextConfig(
        depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32], image_size=SIDE, drop_path_rate=0.4
    ),
    "resnet": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    ),
}  # fmt: skip
PREPARATION = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def write_image_model(folder: Path, kind: str) -> Path:
    """A random model of a kind, with its preparation."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModel.from_config(CONFIGS[kind]())
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):  # statistics as after training
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2.0)
        model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    return folder


def image_plan(base: Path, **settings) -> Plan:
    """A small plan without privacy; `settings` are dotted keys with __ for the dot."""
    raw = {
        "plan": {"name": "test", "purpose": "tests", "seed": 7},
        "model": {
            "base": str(base),
            "task": "image_classification",
            "labels": ["no", "yes", "perhaps"],
            "dtype": "float32",
        },
        "data": {"dataset": "scans"},
        "rounds": {"number": 2},
        "privacy": {"mode": "none", "batch": 4},
        "lora": {"r": 2, "alpha": 4.0},
    }
    plan = Plan.from_mapping(raw)
    return plan.override({k.replace("__", "."): v for k, v in settings.items()})


PRIVATE = {
    "privacy__mode": "record",
    "privacy__epsilon": 8.0,
    "privacy__delta": 1e-5,
    "privacy__clip": 0.5,
}


def write_scans(folder: Path, number: int, *, size: int = 24) -> list[str]:
    """So many drawn pictures as PNG; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for n in range(number):
        names.append(f"{n:03}.png")
        picture = drawn(n, size=size)
        picture[n % size, n // size] = (n, 255 - n, n)  # no two alike
        Image.fromarray(picture).save(folder / names[-1])
    return names


def write_image_site(folder: Path, *, base: Path, number: int = 24, more: str = "") -> Path:
    """A site with a CSV of drawn pictures and labels in turn; its site.toml."""
    names = write_scans(folder / "scans", number)
    labels = ["no", "yes", "perhaps"]
    rows = [f"{name},{labels[n % 3]}" for n, name in enumerate(names)]
    (folder / "records.csv").write_text("\n".join(["file,kind", *rows]) + f"\n{more}")
    config = folder / "site.toml"
    config.write_text(
        f'''name = "{folder.name}"
[datasets.scans]
format = "csv"
path = "records.csv"
images = "scans"
declared_units = {number}
labels = {json.dumps(labels)}
[datasets.scans.columns]
image = "file"
label = "kind"
[datasets.scans.budget]
epsilon = 20.0
delta = 1e-5
'''
    )
    return config


def spread(model, *, scale: float = 0.3) -> None:
    """Trained numbers at random: B and the head start at zero, which hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def noisy(seed: int, *shape: int) -> np.ndarray:
    """Random bytes of a shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
