"""Numbers that an author leaves out of a plan's file, and from what they follow.

A learning rate that suits 340 rounds does not suit 40, and one that suits a head does not suit an
adapter whose gradients are mostly noise. So what an author does not say is no constant: it follows
from what the file says, by the rules below, once, when the file is read (`Plan.load`). From then on it
is written in the plan's text like any other number. Sites approve and sign numbers and never a rule, so
a plan that was stored or signed means the same whatever rules a later version has.

Measured, with what was tried beside them: docs/accuracy.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from silotune.percents import said_percent
from silotune.plan.bands import band_weights, walked_under_sgd
from silotune.plan.sections import HeadFeatures, LoraSection, Sections

PUBLIC_TEXTS = (
    "time", "person", "place", "work", "money", "house", "water", "year", "problem", "number",
    "question", "answer", "report", "day", "name", "cause", "part", "group", "change", "order",
)  # fmt: skip
"""Words that any base model knows: where a plan has none of its own, features are centred by these."""

MOST_CURVED_LABELS = 8
"""With more labels the noise on a head of cosines costs more than they gain."""

_REACH = 10.0  # head: learning rate times rounds, under Adam
_HEAD_LR = (0.03, 0.1)
_MOMENTUM_REACH = 360.0  # the same under SGD, whose steps shrink with the gradient
_MOMENTUM_LR = (1.0, 8.0)
_DRIFT = 0.16  # adapter: what noise alone may move an adapted layer's output by, as a part of it
_ADAPTER_LR = (1e-3, 2e-2)
_CLEAR_ADAPTER_LR = (2e-3, 2e-2)
_CLEAR_REACH = 0.1  # of a language model's adapter without privacy: learning rate times rounds
_HEAD_SHARE_PRIVATE, _HEAD_SHARE_CLEAR, _HEAD_SHARE_PAIRS = 0.9, 1 / 3, 0.5
_PAIRS_RANK, _PAIRS_ALPHA = 2, 4.0


@dataclass(frozen=True, kw_only=True)
class Number:
    """A setting that follows from others: its dotted key, its value as TOML has it, and why."""

    key: str
    value: Any
    why: str


def left_out(plan: Sections) -> tuple[Number, ...]:
    """What the author of a plan did not say and a rule does; a plan that was given it has nothing.

    Parameters
    ----------
    plan : Sections
        As the author wrote it: what is not set was not said.

    Returns
    -------
    tuple of Number
        In the order of the sections.
    """
    return tuple(_unsaid(plan))


def settings_of(numbers: Iterable[Number]) -> dict[str, Any]:
    """Values by dotted key."""
    return {number.key: number.value for number in numbers}


def _unsaid(plan: Sections) -> Iterator[Number]:
    if not plan.sends_sums or not plan.task.trains or plan.vote is not None:
        return  # several local steps: their optimizer's rates depend on no round
    head = plan.task.pools and plan.aggregation.head == "shared"
    rounds, server = plan.head_rounds, plan.optimizer.server.name
    adapts = plan.lora.target_modules != "none"
    if head and adapts and "head_rounds" not in plan.optimizer.site.model_fields_set:
        rounds, why = head_rounds(plan)
        yield Number(key="optimizer.site.head_rounds", value=rounds, why=why)
    if head and "centre_texts" not in plan.model.model_fields_set:
        if not plan.task.sees:
            why = "features are centred by the mean of public words"
            yield Number(key="model.centre_texts", value=list(PUBLIC_TEXTS), why=why)
        if plan.model.head_features is None and rounds == plan.rounds.number and curves(plan):
            features = HeadFeatures(kind="cosines").model_dump(mode="json")
            why = (
                f"no round trains the adapter, {MOST_CURVED_LABELS} labels at most, and held-out "
                "records are like those trained on: a curved head gains, and costs no epsilon"
            )
            yield Number(key="model.head_features", value=features, why=why)
    if rounds == plan.rounds.number and not _adapter_said(plan):
        why = "no round trains the adapter: as small as it can be, for every round carries it"
        yield Number(key="lora.r", value=1, why=why)
    elif head and adapts and plan.per_unit and plan.task.compares and not _adapter_said(plan):
        why = "two texts are compared by the adapter: a small one, for noise grows with its numbers"
        yield Number(key="lora.r", value=_PAIRS_RANK, why=why)
        yield Number(key="lora.alpha", value=_PAIRS_ALPHA, why="twice the rank")
        shaped = LoraSection(r=_PAIRS_RANK, alpha=_PAIRS_ALPHA)
        plan = plan.model_copy(update={"lora": shaped})  # whose rate the next rule finds
    rates: tuple[tuple[str, bool, Callable[..., tuple[float, str]]], ...] = (
        ("head_lr", head, head_lr),
        ("adapter_lr", rounds < plan.rounds.number and server == "adam", adapter_lr),
    )
    for name, trained, rule in rates:
        if trained and name not in plan.optimizer.site.model_fields_set:
            rate, why = rule(plan, head_rounds=rounds)
            yield Number(key=f"optimizer.site.{name}", value=rate, why=why)
    if plan.privacy.bands > 1 and not plan.privacy.band_weights:
        weights, why = band_weights(plan)
        yield Number(key="privacy.band_weights", value=list(weights), why=why)


def _adapter_said(plan: Sections) -> bool:
    return "lora" in plan.model_fields_set


def curves(plan: Sections) -> bool:
    """Whether a head on random cosines is the better one, as far as public facts tell.

    Of a head on every token it was not measured, and it would keep as many cosines for each. On two
    texts they lost.
    """
    if plan.task.each_token or plan.task.compares:
        return False
    return len(plan.model.labels) <= MOST_CURVED_LABELS and plan.data.split_by == "unit"


def head_rounds(plan: Sections) -> tuple[int, str]:
    """First rounds that train the head alone."""
    number = plan.rounds.number
    if not plan.per_unit:
        return round(number * _HEAD_SHARE_CLEAR), "a third: the head first, then both"
    if plan.privacy.bands > 1:
        return number, "all: rounds whose noise is correlated all train the same"
    if plan.task.compares:
        rounds = round(number * _HEAD_SHARE_PAIRS)
        return (
            rounds,
            "half: a head compares two texts badly, an adapter learns it under noise, too",
        )
    if _adapter_said(plan) or plan.aggregation.strategy != "fedavg":
        rounds = math.floor(number * _HEAD_SHARE_PRIVATE)
        return rounds, "nine in ten: the adapter moves little under noise, and a head well"
    return number, (
        "all: under privacy no adapter gained over the head alone on single texts; give "
        "[lora] or head_rounds to train one"
    )


def head_lr(plan: Sections, *, head_rounds: int) -> tuple[float, str]:
    """Learning rate of the head."""
    del head_rounds
    number = plan.rounds.number
    if plan.optimizer.server.name == "sgd":
        rate = _between(_MOMENTUM_LR, _MOMENTUM_REACH / number)
        return (
            rate,
            f"{_MOMENTUM_REACH:g} / rounds, from {_MOMENTUM_LR[0]:g} to {_MOMENTUM_LR[1]:g}",
        )
    rate = _between(_HEAD_LR, _REACH / number)
    return rate, f"{_REACH:g} / rounds, from {_HEAD_LR[0]:g} to {_HEAD_LR[1]:g}"


def adapter_lr(plan: Sections, *, head_rounds: int) -> tuple[float, str]:
    """Learning rate of the adapter.

    Adam divides by the size of what it is given. Where that is noise, a coordinate of B walks at
    random: after rounds of rates ``f_t lr`` it is ``lr sqrt(sum f_t^2)`` from zero. An input of unit
    variance comes out of A (uniform in ±1/sqrt(in)) with variance 1/3 in each of r coordinates, so
    the layer's output moves by ``lr alpha/r sqrt(r/3) sqrt(sum f_t^2)``. That is held at `_DRIFT`;
    what all gradients agree on adds up in proportion to the rounds, and is the larger the more
    often noise can cancel.
    """
    if not plan.per_unit:
        least, most = _CLEAR_ADAPTER_LR
        if plan.task.has_head:
            return least, "usual for LoRA under Adam without noise"
        rate = _between(_CLEAR_ADAPTER_LR, _CLEAR_REACH / plan.rounds.number)
        return rate, f"{_CLEAR_REACH:g} / rounds, from {least:g} to {most:g}, without noise"
    spread = plan.lora.scale * math.sqrt(plan.lora.r / 3.0)
    rate = _between(_ADAPTER_LR, _DRIFT / (spread * _walked(plan, head_rounds)))
    return rate, (
        f"noise alone moves a layer's output by {said_percent(_DRIFT)} in {plan.steps - head_rounds} "
        f"rounds at rank {plan.lora.r}, from {_ADAPTER_LR[0]:g} to {_ADAPTER_LR[1]:g}"
    )


def adapter_lr_under_sgd(plan: Sections, *, noise: float) -> float:
    """The rate at which noise alone moves an adapter under SGD as far as by the rule under Adam.

    SGD's steps are as long as the gradient, so this hangs on how many units a step has, which no plan
    says: nothing is filled in by it.

    Parameters
    ----------
    plan : Sections
        Whose rounds all train the adapter.
    noise : float
        Standard deviation of the noise of a round's mean gradient.
    """
    usual, _ = adapter_lr(plan, head_rounds=0)
    return float(f"{usual * _walked(plan, 0) / (walked_under_sgd(plan) * noise):.2g}")


def _walked(plan: Sections, head_rounds: int) -> float:
    """How far noise has moved a number in a run under Adam, per learning rate."""
    steps = range(head_rounds, plan.steps)
    factors = [plan.optimizer.site.factor(step=step, steps=plan.steps) for step in steps]
    return math.sqrt(sum(value * value for value in factors))


def _between(bounds: tuple[float, float], value: float) -> float:
    """A value within bounds, to two digits: what a person would write."""
    return float(f"{min(max(value, bounds[0]), bounds[1]):.2g}")
