"""Who takes part in the step benchmark: each builds a model and returns one whole step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from dp_step_models import Setting, batch_of, build, inputs, losses_of
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from silotune.models.task import TaskModel
from silotune.privacy.clipping import attach
from silotune.privacy.engine import ClipGroup, DpSgd, PlainSgd
from silotune.privacy.noise import SecureNoise

Step = Callable[[], None]
LEARNING_RATE = 1e-5


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Parameters with gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def peft(setting: Setting, *, reduced: str = "no", parts: int = 1) -> Step:
    """PEFT without privacy: float32, autocast, or the whole model in bfloat16."""
    model, batch = build(setting), batch_of(setting)
    if reduced == "model":
        model = model.to(torch.bfloat16)
        batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE)
    pieces = micro_batches(batch, parts)

    def step() -> None:
        optimizer.zero_grad()
        for piece in pieces:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reduced == "autocast"):
                logits = model(**inputs(piece)).logits
            losses = losses_of(logits, piece["labels"], shifted=setting.task == "causal_lm")
            (losses.sum() / setting.batch).backward()
        optimizer.step()

    return step


def micro_batches(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """A batch in equal parts."""
    size = len(batch["labels"]) // parts
    return [
        {key: value[part * size : (part + 1) * size] for key, value in batch.items()}
        for part in range(parts)
    ]


def opacus(setting: Setting, *, mode: str) -> Step:
    """Opacus' own clipping: per-sample gradients by hooks, or ghost clipping."""
    model, batch = build(setting), batch_of(setting)
    optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE)
    loader = DataLoader(TensorDataset(batch["labels"]), batch_size=setting.batch)
    options = {
        "module": model,
        "optimizer": optimizer,
        "data_loader": loader,
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "poisson_sampling": False,
        "grad_sample_mode": mode,
    }
    engine, criterion = PrivacyEngine(accountant="rdp"), nn.CrossEntropyLoss()
    if mode == "ghost":
        private, optimizer, criterion, _ = engine.make_private(criterion=criterion, **options)
    else:
        private, optimizer, _ = engine.make_private(**options)
    labels = batch["labels"]

    def step() -> None:
        optimizer.zero_grad()
        logits = private(**inputs(batch)).logits
        if mode != "ghost":
            losses_of(logits, labels, shifted=setting.task == "causal_lm").mean().backward()
        elif logits.dim() == 2:
            criterion(logits, labels).backward()
        else:
            kept, target = logits, labels
            if setting.task == "causal_lm":
                kept, target = logits[:, :-1], labels[:, 1:]
            flat = kept.reshape(-1, kept.shape[-1])
            criterion(flat, target.reshape(-1), shape=kept.shape).backward()
        optimizer.step()

    return step


def ours(
    setting: Setting,
    *,
    private: bool = True,
    dtype: torch.dtype = torch.float32,
    parts: int = 1,
    per_unit: int = 1,
) -> Step:
    """silotune's step, with secure noise; or its own non-private twin."""
    model, batch = build(setting), batch_of(setting)
    generates = setting.task == "causal_lm"
    # A language model's losses are those of the package: no step has the logits of a batch.
    whole = TaskModel(model, None, pooling="mean", feature_scale=1.0) if generates else model
    attached = attach(whole, private=private, dtype=dtype)
    parameters = tuple(attached.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    group = ClipGroup("all", parameters, clip=1.0)
    engine = (
        DpSgd(attached, [group], sigma=1.0, noise=SecureNoise()) if private else PlainSgd(attached)
    )
    pieces = micro_batches(batch, parts)
    size = setting.batch // parts
    units = torch.arange(size) // per_unit if per_unit > 1 else None
    n_units = size // per_unit if per_unit > 1 else None

    def losses_in(piece: dict[str, torch.Tensor]) -> torch.Tensor:
        if not generates:
            return losses_of(model(**inputs(piece)).logits, piece["labels"], shifted=False)
        ids = piece["input_ids"]
        known = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "kept": torch.arange(ids.shape[1] - 1),
        }
        return whole.token_losses(known, ids[:, 1:]).mean(1)

    def step() -> None:
        for piece in pieces:
            losses = losses_in(piece)
            engine.accumulate(losses, units=units, n_units=n_units)
        for parameter, total in zip(engine.parameters, engine.release(), strict=True):
            parameter.grad = total / setting.batch
        optimizer.step()
        optimizer.zero_grad()

    return step


def frozen_a(setting: Setting, contender: Callable[[Setting], Step]) -> Step:
    """A contender on FFA-LoRA: only B is trained."""
    return contender(replace(setting, freeze_a=True))


CONTENDERS: dict[str, Callable[[Setting], Step]] = {
    "peft": peft,
    "peft_autocast": partial(peft, reduced="autocast"),
    "peft_bf16": partial(peft, reduced="model"),
    "peft_micro": partial(peft, parts=2),
    "peft_ffa": partial(frozen_a, contender=peft),
    "opacus_hooks": partial(opacus, mode="hooks"),
    "opacus_ghost": partial(opacus, mode="ghost"),
    "ours": ours,
    "ours_twin": partial(ours, private=False),
    "ours_bf16": partial(ours, dtype=torch.bfloat16),
    "ours_bf16_twin": partial(ours, private=False, dtype=torch.bfloat16),
    "ours_ffa": partial(frozen_a, contender=ours),
    "ours_units": partial(ours, per_unit=4),
    "ours_micro": partial(ours, parts=2),
}
