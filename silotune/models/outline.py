"""The layout of a plan's adapter without its base model's weights: names, shapes and bytes.

Whether a base model takes a plan, asked before anybody approves it or waits for it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM

from silotune.errors import ModelError, SilotuneError
from silotune.models.adapter import layout_of
from silotune.models.base import load_model, with_adapter
from silotune.models.layout import Layout
from silotune.models.pretrained import (
    fixed_rng,
    load_config,
    load_tokenizer,
    locate,
    quiet,
    require_length,
    require_text,
    told,
    weight_files,
)
from silotune.models.trial import Refusal, trial_key
from silotune.plan.plan import Plan


def outline(plan: Plan, *, base: str) -> Layout:
    """What the plan's adapter consists of; of the base model no weight is read.

    Parameters
    ----------
    plan : Plan
        What is to be trained.
    base : str
        Where the base model is on this machine: a folder, or an id in the local cache.

    Raises
    ------
    ModelError
        Of some kind: the model is not here, the adapter does not fit it, or its texts.
    """
    folder = locate(base)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    kind = AutoModelForCausalLM if plan.model.task == "causal_lm" else AutoModel
    with fixed_rng(), quiet(), torch.device("meta"):
        try:
            model = kind.from_config(config)
        except Exception as exc:
            raise ModelError(f"{base}: Transformers can't build the model: {told(exc)}") from exc
        require_text(model, tokenizer)
        require_length(model, tokenizer, plan)
        return layout_of(with_adapter(model, plan))


# Weights of larger models are not loaded to answer a question; the site's own trial does it later.
_MOST_BYTES = 4_000_000_000
_ANSWERS: dict[str, Refusal | None] = {}


def require_taken(plan: Plan, *, base: str | None = None) -> None:
    """Check that a base model on this machine can be trained as a plan says; asked once a process.

    Names and numbers are compared without the weights. A model of up to 4 GB is loaded too, and tried
    as it is before training (`silotune.models.trial`).

    Parameters
    ----------
    plan : Plan
        What is to be trained.
    base : str, optional
        Where the base model is on this machine, if not where ``model.base`` says.

    Raises
    ------
    ModelNotFound
        It is not here.
    ModelError
        It can't; the message has the number, the nearest name or the layer.
    """
    folder = locate(base or plan.model.base)
    key = trial_key(plan, folder)
    if key not in _ANSWERS:
        _ANSWERS[key] = _asked(plan, folder)
    if (refusal := _ANSWERS[key]) is not None:
        raise refusal.error()


def _asked(plan: Plan, folder: Path) -> Refusal | None:
    try:
        outline(plan, base=str(folder))
        if sum(path.stat().st_size for path in weight_files(folder)) <= _MOST_BYTES:
            load_model(plan, base=str(folder), device="cpu", attention="eager", dtype="float32")
    except SilotuneError as exc:
        return Refusal.of(exc)
    return None
