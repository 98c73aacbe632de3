"""The layout of a plan's adapter without its base model's weights: names, shapes and bytes."""

from __future__ import annotations

import torch
from transformers import AutoModel, AutoModelForCausalLM

from silotune.errors import ModelError
from silotune.models.adapter import layout_of
from silotune.models.base import with_adapter
from silotune.models.layout import Layout
from silotune.models.pretrained import (
    fixed_rng,
    load_config,
    load_tokenizer,
    quiet,
    require_length,
    require_text,
    told,
)
from silotune.models.weights import locate
from silotune.plan import Plan


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
