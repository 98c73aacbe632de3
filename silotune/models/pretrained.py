"""Loading base models and tokenizers from a folder: offline, quiet, in float32, with dropout off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from silotune.errors import ModelError, ModelNotFound
from silotune.plan import Plan


def load_config(folder: Path) -> Any:
    """Configuration of the model in a folder, with every dropout rate at zero.

    Dropout in the base model would make a record's gradient depend on its place in the batch; LoRA
    has a dropout rate of its own.

    Raises
    ------
    ModelError
        Not readable, or an encoder-decoder model, which no task here fits.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(f"{folder}: Transformers can't use config.json: {_line(exc)}") from exc
    if config.is_encoder_decoder:
        raise ModelError(
            f"{folder}: {config.model_type} is an encoder-decoder model",
            remedy="Use an encoder for text_classification, or a decoder for either task.",
        )
    config.use_cache = False
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def load_base(folder: Path, config: Any, *, plan: Plan, attention: str) -> Any:
    """The base model, float32, on the CPU.

    Raises
    ------
    ModelError
        Transformers can't load it, or the files lack some of its weights.
    """
    kind = AutoModelForCausalLM if plan.model.task == "causal_lm" else AutoModel
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
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as exc:
        raise ModelError(f"{folder}: Transformers can't load the model: {_line(exc)}") from exc
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
    except (OSError, ValueError, KeyError, TypeError, ImportError) as exc:
        raise ModelNotFound(f"{folder} has no usable tokenizer: {_line(exc)}") from exc
    # From config.json alone Transformers makes a tokenizer that knows no word, and says nothing.
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in files):
        raise ModelNotFound(f"{folder} has no tokenizer: none of {', '.join(sorted(files))}")
    return tokenizer


def require_length(config: Any, tokenizer: Any, plan: Plan) -> None:
    """Check that the model has a position for every token. Raises `ModelError`."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (positions, tokenizer.model_max_length) if n is not None]
    if limits and plan.data.max_length > min(limits):
        raise ModelError(
            f"data.max_length is {plan.data.max_length}, the model takes {min(limits)} tokens",
            remedy="Lower data.max_length in the plan.",
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


def _line(problem: Exception) -> str:
    """First line of a library's message."""
    return str(problem).strip().split("\n", 1)[0]
