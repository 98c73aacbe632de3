"""Local steps with a site's own optimizer, for one site or for several at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from silotune.models.layout import Group, Part
from silotune.plan.plan import Plan
from silotune.strategies.server_optimizer import learning_rate


def local_steps(
    plan: Plan,
    parameters: Sequence[Tensor],
    parts: Sequence[Part],
    *,
    server_round: int,
    means: Callable[[], list[Tensor]],
    drift: Tensor | None,
) -> list[Tensor]:
    """Several steps with the sites' own optimizer; the change of the parameters.

    Parameters
    ----------
    plan : Plan
        Says how many, and which optimizer.
    parameters : sequence of Tensor
        What is moved, in place: one site's, or those of several sites, ``[sites, *shape]`` each.
    parts : sequence of Part
        What each is.
    server_round : int
        From 1.
    means : callable
        Gives a step's mean gradients.
    drift : Tensor, optional
        Added to every step's gradients: a row a site, of all parameters one after the other.
    """
    drifts = None if drift is None else _shaped(drift, parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    rule = torch.optim.Adam if plan.optimizer.site.local == "adam" else torch.optim.SGD
    optimizer = rule([{"params": [parameter], "lr": 0.0} for parameter in parameters])
    steps = plan.rounds.local_steps
    for step in range((server_round - 1) * steps, server_round * steps):
        for number, (parameter, mean) in enumerate(zip(parameters, means(), strict=True)):
            kind: Group = "head" if parts[number] == "head" else "adapter"
            optimizer.param_groups[number]["lr"] = learning_rate(plan, kind, step=step)
            parameter.grad = mean
            if drifts is not None:
                parameter.grad += drifts[number]
            if plan.optimizer.site.prox:
                pull = parameter.detach() - before[number]
                parameter.grad += plan.optimizer.site.prox * pull
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [p.detach() - old for p, old in zip(parameters, before, strict=True)]


def _shaped(rows: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(rows, [parameter.numel() // len(rows) for parameter in parameters], dim=1)
    return [
        part.reshape(parameter.shape).to(parameter.device)
        for part, parameter in zip(parts, parameters, strict=True)
    ]
