"""What images go through before a model sees them, beside what Transformers does with Pillow."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from silotune.errors import ModelError
from silotune.models.images import drawn
from silotune.models.preparation import load_preparation
from tests.image_material import PREPARATION

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(64, 64), (300, 180), (97, 400)])
@pytest.mark.parametrize(
    "kind, options",
    [
        (ViTImageProcessorPil, {}),
        (DeiTImageProcessorPil, {}),
        (ConvNextImageProcessorPil, {"size": {"shortest_edge": 224}}),
        (ConvNextImageProcessorPil, {}),  # 384: not cut
        (BitImageProcessorPil, {"size": {"shortest_edge": 256}}),  # DINOv2's
    ],
)
def test_images_are_transformers_own_to_a_few_steps_of_256(kind, options, shape, tmp_path):
    processor = kind(**options)
    processor.save_pretrained(tmp_path)
    preparation = load_preparation(tmp_path, None)
    picture = Image.fromarray(drawn(4)).resize(shape[::-1])
    theirs = processor(images=picture, return_tensors="pt")["pixel_values"]
    ours = preparation.batch(preparation.prepared(np.asarray(picture))[None], CPU)
    assert ours.shape == theirs.shape
    step = 1 / 255 / min(preparation.std)
    assert float((ours - theirs).abs().max()) <= 4.01 * step
    assert float((ours - theirs).abs().mean()) <= 0.1 * step


def test_an_image_smaller_than_what_is_cut_out_has_black_around_it(tmp_path):
    said = {**PREPARATION, "size": {"shortest_edge": 8}, "do_center_crop": True, "crop_size": 12}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    preparation = load_preparation(tmp_path, None)
    white = np.full((8, 8), 255, dtype=np.uint8)
    cut = preparation.prepared(white).reshape(3, 12, 12)
    assert cut[:, 2:10, 2:10].min() == 255
    assert cut.sum() == 3 * 64 * 255


def test_an_image_of_an_extreme_shape_is_prepared_like_any_other(tmp_path):
    """A file of a few kilobytes can be one pixel high and ten million wide."""
    said = {**PREPARATION, "size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    preparation = load_preparation(tmp_path, None)
    grey = np.full((1, 10_000_000), 100, dtype=np.uint8)
    for pixels in (grey, grey.T):
        assert set(preparation.prepared(pixels)) == {100}


def test_grey_models_get_one_channel(tmp_path):
    class Grey:
        num_channels = 1

    said = {**PREPARATION, "image_mean": [0.1], "image_std": 0.5}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    preparation = load_preparation(tmp_path, Grey())
    batch = preparation.batch(preparation.prepared(np.zeros((9, 9), dtype=np.uint8))[None], CPU)
    assert batch.shape == (1, 1, 32, 32)
    assert torch.allclose(batch, torch.tensor(-0.2))


@pytest.mark.parametrize(
    "change, told",
    [
        (None, "has no preprocessor_config.json"),
        ("not json", "preprocessor_config.json"),
        ({"size": {"shortest_edge": 32}}, "shortest_edge alone"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"size": {"height": 100_000, "width": 10}}, "size"),
        ({"do_resize": False}, "do_resize"),
        ({"resample": 1}, "1"),
    ],
)
def test_what_is_not_known_or_not_done_is_refused(change, told, tmp_path):
    path = tmp_path / "preprocessor_config.json"
    if change is not None:
        content = change if isinstance(change, str) else json.dumps({**PREPARATION, **change})
        path.write_text(content)
    with pytest.raises(ModelError, match=told):
        load_preparation(tmp_path, None)
