"""The layout of a plan's adapter without its base model's weights: names, shapes and bytes."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from silotune.errors import ModelError
from silotune.models.adapter import layout_of
from silotune.models.base import TaskModel
from silotune.models.layout import Layout
from silotune.models.lora import wrap
from silotune.models.pretrained import fixed_rng, load_config, quiet
from silotune.models.tasks import get_task
from silotune.models.weights import locate
from silotune.plan import Plan


def outline(plan: Plan, *, base: str) -> Layout:
    """What the plan's adapter consists of; only the base model's config.json is read.

    Parameters
    ----------
    plan : Plan
        What is to be trained.
    base : str
        Where the base model is on this machine: a folder, or an id in the local cache.

    Raises
    ------
    ModelNotFound, ModelError, TargetModulesUnknown
        The model is not here, or the adapter does not fit it.
    """
    config = load_config(locate(base))
    kind = AutoModelForCausalLM if plan.model.task == "causal_lm" else AutoModel
    with fixed_rng(), quiet(), torch.device("meta"):
        try:
            model = kind.from_config(config)
        except (ValueError, KeyError, RuntimeError, ImportError) as exc:
            raise ModelError(f"{base}: Transformers can't build the model") from exc
        hidden = int(config.get_text_config().hidden_size)
        has_head = get_task(plan.model.task).has_head
        head = nn.Linear(hidden, len(plan.model.labels)) if has_head else None
        module = TaskModel(
            wrap(model, plan),
            head,
            pooling=plan.model.pooling,
            feature_scale=plan.model.feature_scale,
            corrected=plan.corrects_weights,
        )
    return layout_of(module)
