"""Where a base model's files are on this machine, and whether they are the plan's.

Nothing is ever downloaded here: a plan comes from outside, and what it names must not decide what a
site fetches. Only safetensors weights are used, since other formats can run code when they are read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from silotune.errors import ModelError, ModelHashMismatch, ModelNotFound
from silotune.privacy.durable import file_sha256

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def locate(base: str) -> Path:
    """Folder of a base model.

    Parameters
    ----------
    base : str
        A folder, or a Hugging Face id whose files are in the local cache.

    Raises
    ------
    ModelNotFound
        Neither is there.
    """
    folder = Path(base).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(base, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as exc:
            raise ModelNotFound(
                f"{base!r} is neither a folder here nor in the local Hugging Face cache"
            ) from exc
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{folder} has no config.json, so it holds no model")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a model: the single one, or the shards that its index names, sorted.

    Raises
    ------
    ModelNotFound
        No safetensors weights, or a shard is missing.
    ModelError
        The index is not readable.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ModelNotFound(
            f"{folder} has neither {SINGLE} nor {INDEX}",
            remedy="Save the model with save_pretrained, which writes safetensors files.",
        )
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted({str(name) for name in index["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as exc:
        raise ModelError(f"{folder / INDEX} is not a readable index of weight files") from exc
    if any(Path(name).name != name for name in names):
        raise ModelError(f"{folder / INDEX} names a file outside of its folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelNotFound(f"{folder} lacks {len(missing)} weight files, the first {missing[0]}")
    return [folder / name for name in names]


def weights_sha256(folder: Path) -> str:
    r"""Hash of a model's weights, as ``model.sha256`` of a plan states it.

    For one file (``model.safetensors``) it is the SHA-256 of the file, as ``sha256sum`` prints it.
    For shards it is the SHA-256 of the UTF-8 text with one line ``name sha256\n`` for each file
    that ``model.safetensors.index.json`` names, sorted by name.

    Raises
    ------
    ModelNotFound, ModelError
        As `weight_files`.
    """
    files = weight_files(folder)
    if [file.name for file in files] == [SINGLE]:
        return file_sha256(files[0])
    lines = "".join(f"{file.name} {file_sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def require_weights(folder: Path, sha256: str | None) -> None:
    """Check that the weights are there and, where the plan states a hash, that they have it.

    Raises
    ------
    ModelNotFound, ModelError
        As `weight_files`.
    ModelHashMismatch
        The hash differs.
    """
    if sha256 is None:
        weight_files(folder)
        return
    found = weights_sha256(folder)
    if found != sha256:
        raise ModelHashMismatch(f"{folder}: the weights hash to {found}, the plan says {sha256}")
