"""LoRA on a frozen base model (Hu et al., 2022): which modules get matrices."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from silotune.errors import ModelError, TargetModulesUnknown
from silotune.models.layout import initial_matrix
from silotune.models.pretrained import told
from silotune.plan.plan import Plan

# Query and value projections as the model families call them; the first group found is taken.
_AUTO = (
    ("query", "value"),  # BERT, RoBERTa, ELECTRA
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT
    ("q_lin", "v_lin"),  # DistilBERT
    ("value_proj",),  # DeBERTa v2 and v3, whose query and key also see positions, once a batch
    ("Wqkv",),  # ModernBERT, MPT
    ("c_attn",),  # GPT-2
    ("query_key_value",),  # GPT-NeoX, Falcon, BLOOM
    ("qkv_proj",),  # Phi-3, CodeGen
    ("in_proj",),  # DeBERTa v1
)
_ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.default\.")
_LAYER = re.compile(r"(?:^|\.)([^.]+)\.(\d+)\.")


def wrap(base: Any, plan: Plan, *, rank: int | None = None) -> PeftModel:
    """Put the plan's LoRA on a base model; the matrices start as `initial_matrix` says.

    Parameters
    ----------
    base : PreTrainedModel
        Changed in place: its own weights are frozen, targeted layers get an adapter.
    plan : Plan
        ``lora`` and ``model.task`` say what to add.
    rank : int, optional
        Another rank than the plan's, at the plan's scale ``alpha / r``.

    Raises
    ------
    TargetModulesUnknown
        A name of ``lora.target_modules`` is no linear layer of the model, "auto" or "all-linear"
        finds none, or PEFT can't adapt one of them.
    ModelError
        ``lora.last_layers`` is more than the model has.
    """
    rank = rank or plan.lora.r
    alpha = plan.lora.alpha * rank / plan.lora.r
    generative = plan.model.task == "causal_lm"
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if generative else TaskType.FEATURE_EXTRACTION,
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=plan.lora.dropout,
        bias="none",
        **_where(base, plan),
    )
    try:
        wrapped = get_peft_model(base, config)
    except Exception as exc:
        raise TargetModulesUnknown(f"PEFT can't adapt this model: {told(exc)}") from exc
    config.base_model_name_or_path = plan.model.base  # PEFT puts the folder of a hub's cache there
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                start = initial_matrix(saved_name(name), tuple(parameter.shape), plan)
                parameter.copy_(torch.from_numpy(start))
                parameter.requires_grad_(".lora_B." in name or not plan.freezes_a)
    return wrapped


def saved_name(live: str) -> str:
    """Name of a live LoRA parameter in PEFT's own files: without the adapter's name."""
    return _ADAPTER_NAME.sub(r"\1.", live)


def _where(base: Any, plan: Plan) -> dict[str, Any]:
    """Arguments of LoraConfig that say which modules get an adapter."""
    layers = {name: m for name, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    # A pooler or output layer is no part of what features and losses are computed from, or is the
    # vocabulary itself; an adapter there would never get a gradient, or be as large as the model.
    unused = {n for n in layers if "pooler" in n.split(".")} | _outputs(base)
    names = _target_names(plan, set(layers) - unused)
    hit = {n for n in layers if any(_matches(n, target) for target in names)}
    where: dict[str, Any] = {"target_modules": sorted(names)}
    if hit & unused:
        where["exclude_modules"] = sorted(hit & unused)
    where["fan_in_fan_out"] = all(isinstance(layers[n], Conv1D) for n in hit - unused)
    if plan.lora.last_layers is not None:
        where |= _last_layers(layers, plan.lora.last_layers)
    return where


def _outputs(base: Any) -> set[str]:
    """Name of the layer that maps to the vocabulary, if the model has one."""
    output = base.get_output_embeddings()
    return {name for name, module in base.named_modules() if module is output}


def _target_names(plan: Plan, usable: set[str]) -> set[str]:
    leaves = {name.rsplit(".", 1)[-1] for name in usable}
    if not leaves:
        raise TargetModulesUnknown("the model has no linear layer that an adapter could be put on")
    asked = plan.lora.target_modules
    if asked == "all-linear":
        return leaves
    if asked == "auto":
        for group in _AUTO:
            if leaves.issuperset(group):
                return set(group)
        raise TargetModulesUnknown(f"'auto' knows no layer of this model; {_listed(leaves)}")
    unknown = sorted({n for n in asked if not any(_matches(name, n) for name in usable)})
    if unknown:
        raise TargetModulesUnknown(
            f"no linear layer of the model is called {', '.join(unknown)}{_nearest(unknown, leaves)}; "
            f"{_listed(leaves)}"
        )
    return set(asked)


def _last_layers(layers: Iterable[str], count: int) -> dict[str, Any]:
    numbered = [match for name in layers if (match := _LAYER.search(name))]
    depth = 1 + max((int(match[2]) for match in numbered), default=-1)
    if count > depth:
        raise ModelError(
            f"lora.last_layers is {count}, the model has {depth} numbered layers",
            remedy="Lower lora.last_layers in the plan, or leave it out to adapt every layer.",
        )
    return {
        "layers_to_transform": list(range(depth - count, depth)),
        "layers_pattern": sorted({match[1] for match in numbered}),
    }


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _nearest(unknown: list[str], leaves: set[str]) -> str:
    near = [m for name in unknown for m in difflib.get_close_matches(name, sorted(leaves), n=1)]
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _listed(leaves: set[str]) -> str:
    return "it has " + ", ".join(sorted(leaves))
