"""Which tokens of a text speak for an answer, and which against it.

Integrated gradients (Sundararajan, Taly and Yan, "Axiomatic attribution for deep networks", ICML 2017)
at the token embeddings, by captum: the gradients of the answer's logit, summed up on the way from a text
of padding to the text. What all tokens get adds up to the difference of the two logits; that is checked,
with more steps until it holds, and told.

It says what the model looks at, not what is so. An explanation shows the record, so it stays here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from silotune.errors import EnvironmentFault, ModelError
from silotune.models.task import LoadedModel
from silotune.plan.plan import Plan

STEPS = (64, 128, 256, 512)
"""Of the sum; the next number where one was not enough."""

TOLERANCE = 0.02
"""How far the sum may be from the difference of logits: a share of it, or of 1 where it is smaller."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What the tokens of one text add to the logit of a label.

    Attributes
    ----------
    label : str
        What is explained.
    probability : float
        Of it.
    tokens : tuple of (str, float)
        Each token, and what it adds to the logit.
    difference, total : float
        The logit of the text less that of padding, and what all tokens add.
    steps : int
        Of the sum.
    complete : bool
        Whether the two agree to `TOLERANCE`.
    """

    label: str
    probability: float
    tokens: tuple[tuple[str, float], ...]
    difference: float
    total: float
    steps: int
    complete: bool


def require_captum() -> Any:
    """Captum's integrated gradients of a layer. Raises `EnvironmentFault`."""
    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError as exc:
        raise EnvironmentFault(
            "an explanation needs captum", remedy="pip install 'silotune[explain]'"
        ) from exc
    return LayerIntegratedGradients


def require_explainable(plan: Plan) -> None:
    """Check that a plan's task gives texts labels. Raises `ModelError`."""
    facts = plan.task
    if facts.counts not in {"confusion", "cells"} or facts.sees:
        raise ModelError(
            f"{plan.model.task} gives no text a label that could be explained",
            remedy="Explain an adapter of text_classification or pair_classification.",
        )


def explain(model: LoadedModel, example: Mapping[str, str], *, label: str = "") -> Explanation:
    """Explain why a text has a label; of a pair, both texts together.

    Parameters
    ----------
    model : LoadedModel
        Of a task that gives a text labels.
    example : mapping of str to str
        The text, or both, by role.
    label : str
        The label; the likeliest where it is empty, also of several that hold.

    Raises
    ------
    EnvironmentFault
        captum is not here.
    ModelError
        The task gives no such labels, or the model has no such label.
    """
    gradients, plan = require_captum(), model.plan
    require_explainable(plan)
    labels = plan.model.labels
    if label and label not in labels:
        raise ModelError(f"there is no such label; there are {', '.join(map(repr, labels))}")
    (answer,) = model.task.predict(model, [example])
    label = label or max(labels, key=lambda one: answer.probabilities[one])
    target = json.dumps([label]) if plan.task.target == "labels" else label
    encoded = model.task.encode(
        [{**example, str(plan.task.target): target}], model.tokenizer, plan=plan
    )
    batch = model.task.collate(encoded, [0], model.device)
    place, module = labels.index(label), model.module
    was_training = module.training
    module.eval()
    try:
        embeddings = module.backbone.get_input_embeddings()
        return _explained(
            model,
            gradients(_logit_of(model, batch, place), embeddings),
            batch,
            answer.probabilities[label],
            label,
        )
    finally:
        module.train(was_training)


def _logit_of(model: LoadedModel, batch: Mapping[str, Tensor], place: int) -> Any:
    """The label's logit as a function of token ids [n, tokens]."""

    def logit(ids: Tensor) -> Tensor:
        rest = {
            name: value.expand(len(ids), *value.shape[1:])
            for name, value in batch.items()
            if name not in {"input_ids", "targets"}
        }
        logits: Tensor = model.module({"input_ids": ids, **rest})
        return logits[:, place]

    return logit


def _explained(
    model: LoadedModel, method: Any, batch: Mapping[str, Tensor], probability: float, label: str
) -> Explanation:
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids, device=ids.device))
    nothing = model.tokenizer.pad_token_id
    if nothing is None:
        nothing = model.tokenizer.eos_token_id or 0
    padding = torch.where(special, ids, torch.full_like(ids, nothing))
    with torch.no_grad():
        difference = float(method.forward_func(ids) - method.forward_func(padding))
    total, steps, complete, each = 0.0, 0, False, torch.zeros(ids.shape[1])
    for steps in STEPS:
        found = method.attribute(ids, baselines=padding, n_steps=steps, internal_batch_size=32)
        each = found.detach().double().sum(-1)[0].cpu()
        total = float(each.sum())
        complete = abs(total - difference) <= TOLERANCE * max(1.0, abs(difference))
        if complete:
            break
    words = [model.tokenizer.decode([token]) for token in ids[0].tolist()]
    return Explanation(
        label=label,
        probability=float(probability),
        tokens=tuple(zip(words, each.tolist(), strict=True)),
        difference=difference,
        total=total,
        steps=steps,
        complete=complete,
    )
