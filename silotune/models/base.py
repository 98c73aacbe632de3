"""A base model with an adapter, and a head where the task has one, ready to be trained.

Before anybody approves a plan or waits for it: whether a base model takes it, and the layout of its
adapter, without the base model's weights.

LoRA on a frozen base model: Hu et al., 2022.

The backbone is a plain Hugging Face model inside a plain `PeftModel`; the head stands beside it. An
adapter saved from it therefore loads with Transformers and PEFT alone.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from silotune.errors import ModelError, SilotuneError, TargetModulesUnknown
from silotune.models.adapter import layout_of
from silotune.models.batching import Encoded
from silotune.models.choices import Choices, choose, resolve_device
from silotune.models.cosines import Cosines
from silotune.models.layout import Layout, initial_matrix, saved_name
from silotune.models.preparation import load_preparation
from silotune.models.pretrained import (
    auto_class,
    fixed_rng,
    load_base,
    load_config,
    load_tokenizer,
    locate,
    quiet,
    require_images,
    require_length,
    require_text,
    require_weights,
    told,
    weight_files,
    width_of,
)
from silotune.models.task import LoadedModel, Task, TaskModel
from silotune.models.tasks import get_task
from silotune.models.trial import Refusal, require_fit, trial_key
from silotune.plan.plan import Plan
from silotune.privacy.quantized import quantize, round_weights

# Weights of larger models are not loaded to answer a question; the site's own trial does it later.
_MOST_BYTES = 4_000_000_000
_ANSWERS: dict[str, Refusal | None] = {}


def load_model(
    plan: Plan,
    *,
    base: str | None = None,
    device: str = "auto",
    attention: str | None = None,
    dtype: str | None = None,
    rank: int | None = None,
    trial: bool = True,
    rounded: bool = False,
) -> LoadedModel:
    """Load the plan's base model and put a fresh adapter on it.

    The adapter depends on the plan alone (see `silotune.models.layout.initial_matrix`), and the state
    of global random generators neither matters nor changes.

    Parameters
    ----------
    plan : Plan
        What to load.
    base : str, optional
        Where the base model is on this machine, if not where ``model.base`` says.
    device : str
        As for `silotune.models.choices.choose`.
    attention, dtype : str, optional
        What `choose` said, so that all processes of a run compute alike. What is left out is
        chosen here by `choose`'s fixed rule.
    rank : int, optional
        Of this site's adapter, if smaller than the plan's; its scale is the plan's all the same.
    trial : bool
        Try it on public texts (`silotune.models.trial.require_fit`). What was trained already need
        not be tried to be used.
    rounded : bool
        Frozen weights that the plan keeps in few bits are rounded so, and lie in float32 in the base
        model's own layers: it answers alike, and can be exported.

    Raises
    ------
    ModelError
        Of some kind: the model is not there, does not fit the plan, or did not stand the trial.
    EnvironmentFault
        The device is not there.
    """
    folder = locate(base or plan.model.base)
    require_weights(folder, plan.model.sha256)
    choices = _complete(plan, base=base, device=device, attention=attention, dtype=dtype)
    model = _assembled(plan, folder, choices, rank=rank, rounded=rounded)
    if trial:
        require_fit(model, folder)
    return model


def _assembled(
    plan: Plan, folder: Path, choices: Choices, *, rank: int | None, rounded: bool = False
) -> LoadedModel:
    config = load_config(folder)
    tokenizer = _reader(plan, folder, config)
    task, place = get_task(plan), torch.device(choices.device)
    with fixed_rng(), quiet():
        bare = load_base(folder, config, plan=plan, attention=choices.attention)
        _require_inputs(bare, tokenizer, plan)
        size = sum(parameter.numel() for parameter in bare.parameters())
        module = with_adapter(bare, plan, rank=rank)
        if plan.model.quantization != "none":
            (round_weights if rounded else quantize)(module, plan.model.quantization)
    module.to(place).train()
    _centre(module, tokenizer, task, plan, place)
    layout, kept = layout_of(module), plan.model.quantization
    size_told = f"{size / 1e6:.1f} M parameters" + (f" in {kept}" if kept != "none" else "")
    return LoadedModel(
        module=module,
        tokenizer=tokenizer,
        task=task,
        layout=layout,
        device=place,
        dtype=getattr(torch, choices.dtype),
        attention=choices.attention,
        description=f"{_shown(folder, plan)} ({config.model_type}), {size_told}, "
        f"{layout.size:,} trained; {choices}",
        plan=plan,
    )


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
    config = load_config(folder)
    tokenizer = _reader(plan, folder, config)
    kind = auto_class(config, plan)
    with fixed_rng(), quiet(), torch.device("meta"):
        try:
            model = kind.from_config(config)
        except Exception as exc:
            raise ModelError(f"{base}: Transformers can't build the model: {told(exc)}") from exc
        _require_inputs(model, tokenizer, plan)
        return layout_of(with_adapter(model, plan))


def _reader(plan: Plan, folder: Path, config: Any) -> Any:
    """What makes numbers of a record for the model: its tokenizer, or its preparation of images."""
    return load_preparation(folder, config) if plan.task.sees else load_tokenizer(folder)


def _require_inputs(model: Any, tokenizer: Any, plan: Plan) -> None:
    if plan.task.sees:
        require_images(model, plan)
        return
    require_text(model, tokenizer)
    require_length(model, tokenizer, plan)


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


def with_adapter(bare: PreTrainedModel, plan: Plan, *, rank: int | None = None) -> TaskModel:
    """A base model with the plan's adapter, and head where the task has one.

    Raises
    ------
    TargetModulesUnknown, ModelError
        The adapter does not fit the model.
    """
    head, cosines = None, None
    if plan.task.has_head:
        hidden = width_of(bare.config)
        if hidden is None:
            raise ModelError(f"a {bare.config.model_type} model has no one width of hidden states")
        cosines = Cosines.of(plan, hidden=int(hidden))
        width = int(hidden) if cosines is None else len(cosines.phases)
        head = nn.Linear(width, plan.task.outputs(plan.model))
    return TaskModel(
        wrap(bare, plan, rank=rank),
        head,
        pooling="each" if plan.task.each_token else plan.model.pooling,
        feature_scale=plan.model.feature_scale,
        cosines=cosines,
    )


def _complete(
    plan: Plan, *, base: str | None, device: str, attention: str | None, dtype: str | None
) -> Choices:
    if attention is None or dtype is None:
        found = choose(plan, device=device, base=base, measure=False)
        if attention is None and dtype is None:
            return found
        attention, dtype = attention or found.attention, dtype or found.dtype
    return Choices(device=str(resolve_device(device)), dtype=dtype, attention=attention)


def _centre(module: TaskModel, tokenizer: Any, task: Task, plan: Plan, place: torch.device) -> None:
    """Set the centre, and the unit of distance, by the base model as it came.

    From public texts of the plan. Drawn pictures say how far apart images are, and not where they lie.
    """
    texts = ("",) * _PICTURES if plan.task.sees else plan.model.centre_texts
    if module.head is None or not texts or (plan.task.sees and module.cosines is None):
        return
    examples = [task.example(text, number=n, plan=plan) for n, text in enumerate(texts)]
    encoded: Encoded = task.encode(examples, tokenizer, plan=plan)
    with module.inference():
        batch = task.collate(encoded, range(len(texts)), place)
        embedded = module.embed(batch)
        if plan.task.each_token:
            embedded = embedded[batch["attention_mask"].bool()]
        if not plan.task.sees:  # drawn pictures have little in common with photographs
            module.centre.copy_(embedded.mean(0))
        if module.cosines is not None:
            module.cosines.fit(embedded)


def _shown(folder: Path, plan: Plan) -> str:
    """Name of a model for people: its hub id, or the last two parts of its folder."""
    named = Path(plan.model.base).expanduser()
    return "/".join(folder.resolve().parts[-2:]) if named.is_dir() else plan.model.base


# Query and value projections as the model families call them; the first group found is taken.
_AUTO = (
    ("query", "value"),  # BERT, RoBERTa, ELECTRA
    ("q_proj", "v_proj"),  # ViT, DeiT, DINOv2, Llama, Mistral, Qwen, Gemma, OPT
    ("q_lin", "v_lin"),  # DistilBERT
    ("q", "v"),  # MPNet, T5
    ("value_proj",),  # DeBERTa v2 and v3, whose query and key also see positions, once a batch
    ("Wqkv",),  # ModernBERT, MPT
    ("c_attn",),  # GPT-2
    ("query_key_value",),  # GPT-NeoX, Falcon, BLOOM
    ("qkv_proj",),  # Phi-3, CodeGen
    ("in_proj",),  # DeBERTa v1
    ("pwconv1", "pwconv2"),  # ConvNeXt, whose other layers are convolutions
)
# Where it is other layers: attention of these sees windows, which are no batch of records.
_AUTO_OF = {"swin": ("fc1", "fc2"), "swinv2": ("fc1", "fc2")}
_PEFT_TASKS = {
    "encoder": TaskType.FEATURE_EXTRACTION,
    "decoder": TaskType.CAUSAL_LM,
    "image": None,  # PEFT's own would ask for token ids
}
_PICTURES = 24
_LAYER = re.compile(r"(?:^|\.)([^.]+)\.(\d+)\.")


def wrap(base: Any, plan: Plan, *, rank: int | None = None) -> Any:
    """Put the plan's LoRA on a base model; the matrices start as `initial_matrix` says.

    With ``target_modules = "none"`` the model is frozen and given back as it is.

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
    if plan.lora.target_modules == "none":
        return base.requires_grad_(False)
    rank = rank or plan.lora.r
    root = plan.lora.scaling == "rslora"
    alpha = plan.lora.alpha
    if rank != plan.lora.r:
        alpha = plan.lora.scale * (math.sqrt(rank) if root else rank)
    config = LoraConfig(
        task_type=_PEFT_TASKS[plan.task.base],
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=plan.lora.dropout,
        use_rslora=root,
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


def _where(base: Any, plan: Plan) -> dict[str, Any]:
    """Arguments of LoraConfig that say which modules get an adapter."""
    layers = {name: m for name, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    # A pooler or output layer is no part of what features and losses are computed from, or is the
    # vocabulary itself; an adapter there would never get a gradient, or be as large as the model.
    unused = {n for n in layers if "pooler" in n.split(".")} | _outputs(base)
    names = _target_names(plan, set(layers) - unused, kind=base.config.model_type)
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


def _target_names(plan: Plan, usable: set[str], *, kind: str) -> set[str]:
    leaves = {name.rsplit(".", 1)[-1] for name in usable}
    if not leaves:
        raise TargetModulesUnknown(
            "the model has no linear layer that an adapter could be put on",
            remedy="Train the head alone: lora.target_modules = 'none'.",
        )
    asked = plan.lora.target_modules
    if asked == "all-linear":
        return leaves
    if asked == "auto":
        if "query_global" in leaves:  # Longformer, whose query and value see tokens before records
            return {"dense"}
        for group in (*([_AUTO_OF[kind]] if kind in _AUTO_OF else []), *_AUTO):
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
