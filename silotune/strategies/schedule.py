"""Learning rates by step: the same rule at a site that takes steps and at a server that does."""

from __future__ import annotations

import math
from typing import Literal

from silotune.plan.plan import Plan
from silotune.plan.sections import ClientOptimizer

Phase = Literal["head", "adapter"]
Group = Literal["adapter", "head"]


def phase_of(plan: Plan, server_round: int) -> Phase:
    """What a round (from 1) trains: the head alone, or adapter and head together."""
    return "head" if server_round <= plan.optimizer.site.head_rounds else "adapter"


def factor(optimizer: ClientOptimizer, *, step: int, steps: int) -> float:
    """Part of the peak learning rate at `step` (from 0) of `steps`: linear warm-up, then decay."""
    warmup = optimizer.warmup_share * steps
    rise = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    done = step / steps
    if optimizer.schedule == "constant":
        return rise
    span = 1.0 - optimizer.final_share
    if optimizer.schedule == "cosine":
        return rise * (optimizer.final_share + span * (1 + math.cos(math.pi * done)) / 2)
    return rise * (1.0 - span * done)


def learning_rate(plan: Plan, group: Group, *, step: int) -> float:
    """Learning rate of a group at a step (from 0) of the whole run."""
    site = plan.optimizer.site
    peak = site.head_lr if group == "head" else site.adapter_lr
    return peak * factor(site, step=step, steps=plan.steps)
