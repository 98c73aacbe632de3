"""What an image goes through before a model sees it: by the numbers of its ``preprocessor_config.json``.

Resized, cut to the middle, and kept as bytes; then, in a batch, brought to the mean and spread that the
model was trained with. PyTorch does it, in one way on every machine; nothing is drawn at random.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from silotune.errors import ModelError
from silotune.models.images import MOST_PIXELS, Pixels, channels

FILE = "preprocessor_config.json"

_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_WARPED_FROM = 384  # ConvNeXt: as large images are not cut
_LARGEST_SIDE = 2048


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How images become what a model takes.

    Attributes
    ----------
    height, width : int
        Pixels of every prepared image.
    resized : int or (int, int)
        What the shorter side is resized to, or both, whatever the image's shape; of the result the
        middle is taken.
    mode : str
        ``nearest``, ``bilinear`` or ``bicubic``.
    mean, std : tuple of float
        One number a channel, of values between 0 and 1.
    """

    height: int
    width: int
    resized: int | tuple[int, int]
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def size(self) -> int:
        """Bytes of a prepared image."""
        return len(self.mean) * self.height * self.width

    def prepared(self, pixels: Pixels) -> NDArray[np.uint8]:
        """An image as bytes [size]: channel by channel, row by row.

        A shape so extreme that its longer side would have too many pixels is squeezed: no image fails.
        """
        image = torch.from_numpy(channels(pixels, len(self.mean)).copy()).permute(2, 0, 1)[None]
        if isinstance(self.resized, int):
            tall, wide = image.shape[2:]
            long = max(self.resized, self.resized * max(tall, wide) // min(tall, wide))
            long = min(long, max(self.resized, MOST_PIXELS // self.resized))
            sides = (long, self.resized) if tall > wide else (self.resized, long)
        else:
            sides = self.resized
        return _middle(self._scaled(image, sides), self.height, self.width).numpy().reshape(-1)

    def _scaled(self, image: Tensor, sides: tuple[int, int]) -> Tensor:
        if self.mode == "nearest":
            return interpolate(image, sides, mode="nearest-exact")
        return interpolate(image, sides, mode=self.mode, align_corners=False, antialias=True)

    def batch(self, images: NDArray[np.integer[Any]], device: torch.device) -> Tensor:
        """Prepared images [n, size] as the model takes them: float32 [n, channels, height, width]."""
        shape = (len(images), len(self.mean), self.height, self.width)
        values = (
            torch.from_numpy(images.astype(np.uint8, copy=False)).to(device).view(shape).float()
            / 255.0
        )
        mean, std = (torch.tensor(part, device=device) for part in (self.mean, self.std))
        return (values - mean[:, None, None]) / std[:, None, None]


def _middle(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of an image; zeros (black) around one that is smaller."""
    tall, wide = image.shape[2:]
    made = image.new_zeros(1, image.shape[1], max(tall, height), max(wide, width))
    top, left = (made.shape[2] - tall) // 2, (made.shape[3] - wide) // 2
    made[:, :, top : top + tall, left : left + wide] = image
    top, left = (made.shape[2] - height) // 2, (made.shape[3] - width) // 2
    return made[:, :, top : top + height, left : left + width]


def load_preparation(folder: Path, config: Any) -> Preparation:
    """What ``preprocessor_config.json`` in a model's folder says.

    Raises
    ------
    ModelError
        There is no such file, or it says what isn't done here.
    """
    path = folder / FILE
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return _read(said, int(getattr(config, "num_channels", 3)))
    except OSError as exc:
        raise ModelError(
            f"{folder} has no {FILE}, so it is not known how images are prepared for the model",
            remedy="Save the model's image processor beside it, with save_pretrained.",
        ) from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelError(
            f"{path}: {exc}", remedy="Give size, image_mean and image_std, as Transformers does."
        ) from exc


def _read(said: Mapping[str, Any], number: int) -> Preparation:
    if number not in {1, 3}:
        raise ValueError(f"the model takes {number} channels; images have 1 or 3")
    if not said.get("do_resize", True):
        raise ValueError("do_resize is false, and images must all be of one size")
    if (
        not said.get("do_rescale", True)
        or abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6
    ):
        raise ValueError("rescale_factor is not 1/255")
    size = said["size"]
    resized: int | tuple[int, int]
    if isinstance(size, Mapping) and "shortest_edge" in size:
        resized = int(size["shortest_edge"])
        final = (resized, resized)
        if "crop_pct" in said:  # ConvNeXt's
            resized = int(resized / said["crop_pct"]) if resized < _WARPED_FROM else final
        elif not said.get("do_center_crop"):
            raise ValueError("size has shortest_edge alone, and images must all be of one size")
    else:
        resized = final = _sides(size)
    height, width = _sides(said["crop_size"]) if said.get("do_center_crop") else final
    if not (0 < height <= _LARGEST_SIDE and 0 < width <= _LARGEST_SIDE):
        raise ValueError(f"size: a side is from 1 to {_LARGEST_SIDE} pixels")
    normalized = said.get("do_normalize", True)
    return Preparation(
        height=height,
        width=width,
        resized=resized,
        mode=_MODES[int(said.get("resample", 2))],
        mean=_numbers(said["image_mean"], number) if normalized else (0.0,) * number,
        std=_numbers(said["image_std"], number) if normalized else (1.0,) * number,
    )


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return int(size["height"]), int(size["width"])


def _numbers(given: Any, number: int) -> tuple[float, ...]:
    found = tuple(map(float, given if isinstance(given, list) else [given] * number))
    if len(found) != number:
        raise ValueError(
            f"the model takes {number} channels, image_mean or image_std has {len(found)}"
        )
    return found
