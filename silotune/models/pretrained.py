"""Base models and tokenizers from a folder: offline, quiet, in float32, with dropout off.

Also where the files of a base model are on this machine, and whether they are the plan's. Nothing is
ever downloaded here: a plan comes from outside, and what it names must not decide what a site
fetches. Only safetensors weights are used, since other formats can run code when they are read.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from silotune.errors import LengthRefused, ModelError, ModelHashMismatch, ModelNotFound, TextRefused
from silotune.plan.plan import Plan
from silotune.trust.files import file_sha256


def load_config(folder: Path) -> Any:
    """Configuration of the model in a folder, with every dropout rate and a router's noise at zero.

    Either in the base model would make a record's gradient depend on its place in the batch; LoRA
    has a dropout rate of its own.

    Raises
    ------
    ModelError
        Not readable.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as exc:
        raise ModelError(f"{folder}: Transformers can't use config.json: {told(exc)}") from exc
    config.use_cache = False
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if ("drop" in key or "jitter" in key) and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def auto_class(config: Any, plan: Plan) -> Any:
    """Transformers' class that builds the base model of a plan: of T5 and its kin the encoder alone.

    Raises
    ------
    ModelError
        An encoder-decoder model that the plan's task can't use.
    """
    alone = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    if not plan.task.generates and getattr(alone, "__name__", "").endswith("EncoderModel"):
        return AutoModelForTextEncoding
    if config.is_encoder_decoder:
        raise ModelError(
            f"{config.model_type} is an encoder-decoder model",
            remedy="Use a decoder, or an encoder where the task has a head.",
        )
    return AutoModelForCausalLM if plan.task.generates else AutoModel


def load_base(folder: Path, config: Any, *, plan: Plan, attention: str) -> Any:
    """The base model, float32, on the CPU.

    Raises
    ------
    ModelError
        Transformers can't load it, or the files lack some of its weights.
    """
    kind = auto_class(config, plan)
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as exc:
        raise ModelError(f"{folder}: Transformers can't load the model: {told(exc)}") from exc
    # Weights that a file lacks start at random. The pooler's don't matter, nothing uses them here.
    lacking = sorted(k for k in info["missing_keys"] if "pooler" not in k.split("."))
    if lacking:
        raise ModelError(
            f"{folder} lacks {len(lacking)} weights of a {config.model_type} model for "
            f"{plan.model.task}, the first {lacking[0]}",
            remedy="Use a base model that was saved whole, or another task.",
        )
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder. Raises `ModelNotFound`."""
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as exc:
        raise ModelNotFound(f"{folder} has no usable tokenizer: {told(exc)}") from exc
    # From config.json alone Transformers makes a tokenizer that knows no word, and says nothing.
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in files):
        raise ModelNotFound(f"{folder} has no tokenizer: none of {', '.join(sorted(files))}")
    return tokenizer


def require_text(model: Any, tokenizer: Any) -> None:
    """Check that a model takes token ids, and all those of the tokenizer. Raises `TextRefused`."""
    takes = str(getattr(model, "main_input_name", "input_ids"))
    if takes != "input_ids":
        raise TextRefused(f"a {model.config.model_type} model takes {takes}, not token ids")
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # hashes its tokens
        rows = None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if rows is not None and largest >= rows:
        raise TextRefused(
            f"the tokenizer has token ids up to {largest}, the model has embeddings for {rows} tokens",
            remedy="Use the tokenizer that the model was trained with.",
        )


def require_images(model: Any, plan: Plan) -> None:
    """Check that a model takes images, and has the class token that the plan asks for."""
    kind, takes = model.config.model_type, str(getattr(model, "main_input_name", ""))
    if takes != "pixel_values":
        raise ModelError(
            f"a {kind} model takes {takes}, not images",
            remedy="Use a model of images, such as ViT, Swin, DINOv2 or ConvNeXt.",
        )
    named = any("cls_token" in name for name, _ in model.named_parameters())
    if plan.model.pooling == "first" and not named:
        raise ModelError(
            f"a {kind} model has no class token", remedy="Set model.pooling = 'mean' in the plan."
        )


def width_of(config: Any) -> int | None:
    """Width of a model's last hidden states; None where it has no one width."""
    text = config.get_text_config()
    last = [*(getattr(text, "hidden_sizes", None) or ()), getattr(text, "hidden_dim", None)]
    found = getattr(text, "hidden_size", None) or next((n for n in last[::-1] if n), None)
    return None if found is None else int(found)


def require_length(model: Any, tokenizer: Any, plan: Plan) -> None:
    """Check that the model has a position for every token. Raises `LengthRefused`.

    Other limits than those that a model states are found by `silotune.models.trial`.
    """
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (stated, tokenizer.model_max_length) if n is not None and n > 0]
    for name, layer in model.named_modules():
        # RoBERTa and its kin count positions from the one behind that of padding.
        if name.endswith("position_embeddings") and isinstance(layer, nn.Embedding):
            first = -1 if layer.padding_idx is None else layer.padding_idx
            limits.append(layer.num_embeddings - first - 1)
    if limits and plan.data.max_length > min(limits):
        raise LengthRefused(
            f"data.max_length is {plan.data.max_length}, the model takes {min(limits)} tokens"
        )


@contextmanager
def fixed_rng() -> Iterator[None]:
    """Start the CPU's random generator at a fixed point, and put its state back at the end.

    Libraries fill new parameters with random numbers; neither may these differ between sites nor
    may loading a model change what the caller draws next.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and warnings of Transformers and PEFT off the terminal."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def told(problem: Exception) -> str:
    """First line of a library's message, or its type where it says nothing."""
    return str(problem).strip().split("\n", 1)[0] or type(problem).__name__


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
