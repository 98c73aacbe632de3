"""Finding and hashing weights: only here, only whole, only safetensors."""

import hashlib
import json
import subprocess

import pytest

from silotune.errors import ModelError, ModelHashMismatch, ModelNotFound
from silotune.models.pretrained import locate, require_weights, weight_files, weights_sha256
from tests.models.model_material import minilm


def shards(folder, names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode() * 3)
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_hash_of_one_file_is_what_sha256sum_prints():
    folder = locate(minilm())
    shown = subprocess.run(
        ["sha256sum", folder / "model.safetensors"], capture_output=True, check=True, text=True
    )
    assert weights_sha256(folder) == shown.stdout.split()[0]


def test_the_hash_of_shards_is_the_hash_of_their_sorted_listing(tmp_path):
    shards(tmp_path, ["model-b.safetensors", "model-a.safetensors"])
    lines = [
        f"{n} {hashlib.sha256(n.encode() * 3).hexdigest()}\n"
        for n in ("model-a.safetensors", "model-b.safetensors")
    ]
    assert weights_sha256(tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_changed_file_has_another_hash_and_is_refused(tmp_path):
    shards(tmp_path, ["a.safetensors", "b.safetensors"])
    before = weights_sha256(tmp_path)
    require_weights(tmp_path, before)
    (tmp_path / "b.safetensors").write_bytes(b"other")
    with pytest.raises(ModelHashMismatch, match=before):
        require_weights(tmp_path, before)


@pytest.mark.parametrize("base", ["/no/such/folder", "./none", "no-such/model", "a b c", "x"])
def test_a_missing_model_is_refused_with_a_remedy(base):
    with pytest.raises(ModelNotFound) as caught:
        locate(base)
    assert "Download the model" in caught.value.remedy


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        locate(str(tmp_path))


def test_weights_in_a_format_that_can_run_code_are_not_taken(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match=r"model\.safetensors"):
        weight_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    shards(tmp_path, ["a.safetensors", "b.safetensors"])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"b\.safetensors"):
        require_weights(tmp_path, None)


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"w": "../x"}}'])
def test_an_index_that_makes_no_sense_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError):
        weight_files(tmp_path)
