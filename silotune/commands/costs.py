"""What a plan is expected to cost, and where its settings lie in a bad corner."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from silotune.plan.bands import noise_in_adapters
from silotune.plan.document import canonical_json
from silotune.plan.left_out import MOST_CURVED_LABELS, adapter_lr, adapter_lr_under_sgd, head_lr
from silotune.plan.plan import Plan, candidates_of
from silotune.plan.voted import blocks_at

if TYPE_CHECKING:
    from silotune.models.layout import Layout, Part
    from silotune.models.task import LoadedModel

_FEWEST_UNITS = 10  # a step, at a site
_FAR = 5.0  # times more or less than what a rule would say
_NO_GAIN = 0.98  # of independent noise, that correlated noise leaves
_LOST = 3.0  # signal over noise of a whole run, below which most of what is learned is lost
_TEXTS = 8  # that the time of a record is measured with
_PASSES, _MEASURING = 5, 0.3  # of which the shortest counts: at most so many, and seconds
_HEAD_STEP = 2.5e-3  # seconds of a step of a head in a block, whatever its units
_CLEAR = 6.0  # times the noise of a number of votes that there are votes, for a choice to be one
_BACKWARD = 3.0  # a training step takes as long as so many forward passes


def moved(plan: Plan, layout: Layout) -> tuple[int, int]:
    """Bytes that a site sends and is sent in a whole run, masks and envelopes not counted."""
    up = sum(
        rounds * sum(span.size for span in layout.spans(parts))
        for parts, rounds in _rounds_by_parts(plan).items()
    )
    return 4 * up, plan.rounds.number * layout.nbytes


def _rounds_by_parts(plan: Plan) -> Counter[frozenset[Part]]:
    """How many rounds send which parts."""
    from silotune.strategies import method_of

    method = method_of(plan)
    return Counter(method.sent(plan, number) for number in range(1, plan.rounds.number + 1))


def seconds_a_record(model: LoadedModel) -> float:
    """Time of a forward pass of one text of the greatest length, on this machine.

    The shortest of some: what else the machine does meanwhile makes a pass longer, never shorter.
    """
    text = "word " * model.plan.data.max_length
    example = model.task.example(text, number=0, plan=model.plan)
    encoded = model.task.encode([example] * _TEXTS, model.tokenizer, plan=model.plan)
    batch = model.task.collate(encoded, range(_TEXTS), model.device)
    passes: list[float] = []
    with model.module.inference():
        model.module(batch)  # the first pass also sets things up
        while len(passes) < _PASSES and math.fsum(passes) < _MEASURING:
            started = time.perf_counter()
            model.module(batch)
            passes.append(time.perf_counter() - started)
    return min(passes) / _TEXTS


def seconds(plan: Plan, *, record: float, units: int) -> float:
    """Computing time of a run at a site of so many units, of which a forward pass takes `record`."""
    if plan.vote is not None:
        return _vote_seconds(plan, record=record, units=units)
    each = plan.privacy.max_records_per_unit * record
    head = plan.head_rounds
    steps = (plan.rounds.number - head) * plan.rounds.local_steps
    trained = steps * plan.expected_batch(units) * _BACKWARD
    return each * (trained + (units if head else 0))


def sites_a_round(plan: Plan, sites: int) -> int:
    """How many of so many sites a round asks."""
    return sites if plan.rounds.sites is None else min(sites, plan.rounds.sites)


def _vote_seconds(plan: Plan, *, record: float, units: int) -> float:
    """Features of all units once for each model that candidates have, and the steps of all blocks."""
    candidates = candidates_of(plan)
    models = {canonical_json(one.model.written()) for one in candidates}
    most = candidates[0].privacy.max_records_per_unit
    features = len(models) * plan.training_units(units) * most * record
    return features + _HEAD_STEP * blocks_at(plan, units) * sum(one.steps for one in candidates)


def close_votes(plan: Plan, declared: Mapping[str, int], *, noise: float) -> list[str]:
    """That a vote's noise is too large for so few blocks, in a sentence."""
    blocks = sum(blocks_at(plan, units) for units in declared.values())
    if not blocks or blocks >= _CLEAR * noise:
        return []
    return [
        f"{blocks} blocks have {blocks} votes together, and each number of votes gets noise of "
        f"{noise:.1f}: with fewer than {_CLEAR:g} times the noise it is mostly noise that chooses. Take "
        "a smaller vote.block_units or a larger epsilon"
    ]


def corners(plan: Plan, layout: Layout | None, declared: Mapping[str, int]) -> list[str]:
    """Where a plan's settings contradict what was measured, in sentences."""
    if plan.only_sums:
        return []
    return [*_rates(plan), *_noise(plan, layout, declared), *_features(plan)]


def _rates(plan: Plan) -> Iterator[str]:
    site, head = plan.optimizer.site, plan.head_rounds
    if not plan.sends_sums:
        if plan.per_unit:
            yield (
                f"{plan.rounds.local_steps} local steps under privacy: each is noised alone, and the "
                "noise can't be shared; one step a round learned more where it was measured"
            )
        return
    rules = {
        "head_lr": (site.head_lr, head_lr, plan.task.has_head),
        "adapter_lr": (
            site.adapter_lr,
            adapter_lr,
            head < plan.rounds.number and plan.optimizer.server.name == "adam",
        ),
    }
    for key, (rate, rule, trained) in rules.items():
        if not trained:
            continue
        usual, why = rule(plan, head_rounds=head)
        if not usual / _FAR <= rate <= usual * _FAR:
            much = "small" if rate < usual else "large"
            yield (
                f"optimizer.site.{key} = {rate:g} is {much} for this plan: left out, it would be "
                f"{usual:g} ({why})"
            )


def beside_independent(plan: Plan, declared: Mapping[str, int]) -> float | None:
    """Noise in a run's adapters, over that of independent noise at the same epsilon.

    At the site where it is largest; None where noise is not correlated, or no sizes are known.
    """
    from silotune.client.terms import sigma_for

    if plan.privacy.bands == 1 or not declared:
        return None
    plain = plan.override({"privacy.bands": None, "privacy.band_weights": None})
    left = noise_in_adapters(plan, plan.privacy.column)
    return max(left * sigma_for(plan, n) / sigma_for(plain, n) for n in declared.values())


def _noise(plan: Plan, layout: Layout | None, declared: Mapping[str, int]) -> Iterator[str]:
    if not plan.per_unit or not declared:
        return
    yield from _adapter_under_sgd(plan, declared)
    left = beside_independent(plan, declared)
    if left is not None and left > _NO_GAIN:
        yield (
            f"privacy.bands = {plan.privacy.bands} leaves {left:.2f} of the noise that independent "
            "rounds leave in the adapters: it gains nothing here; remove it, or have a larger "
            "epsilon or a smaller rate"
        )
    few = [name for name, n in declared.items() if plan.expected_batch(n) < _FEWEST_UNITS]
    if few:
        yield (
            f"a step expects fewer than {_FEWEST_UNITS} units at {', '.join(few)}: raise privacy.rate"
        )
    asked = sites_a_round(plan, len(declared))
    if plan.privacy.noise == "local" and asked >= 3 and plan.sends_sums:
        yield (
            f"privacy.noise = 'local': the sum of {asked} sites has "
            f"{math.sqrt(asked):.1f} times the noise that it has with 'shared'"
        )
    if layout is not None:
        yield from _signals(plan, layout, declared)


def signals(
    plan: Plan, layout: Layout, declared: Mapping[str, int]
) -> dict[str, tuple[float, int, int]]:
    """By clipping group: signal over noise of one step, numbers in it, and rounds that train it.

    The signal is as long as it can be: every unit's gradient has the length of its clip, and all of
    them point one way. The noise is a vector of as many normal numbers.
    """
    clipping = plan.privacy.clipping
    sigma, units = _sum_of_step(plan, declared)
    sigma *= noise_in_adapters(plan, plan.privacy.column)  # of many rounds, what they take back
    found: dict[str, tuple[float, int, int]] = {}
    for name, bound in clipping.bounds.items():
        best, numbers, rounds = 0.0, 0, 0
        for parts, count in _rounds_by_parts(plan).items():
            own = [span for span in layout.spans(parts) if clipping.group(span.part) == name]
            size = sum(span.size for span in own)
            if not size:
                continue
            alone = all(clipping.group(part) == name for part in parts)
            ratio = units / (sigma * math.sqrt(size / (1.0 if alone else bound.share)))
            best, numbers, rounds = max(best, ratio), max(numbers, size), rounds + count
        if rounds:
            found[name] = best, numbers, rounds
    return found


def _sum_of_step(plan: Plan, declared: Mapping[str, int]) -> tuple[float, float]:
    """Noise of a round's sum, in clips, and the units that it expects, of all sites together."""
    from silotune.client.terms import sigma_for

    sigmas = [sigma_for(plan, units) for units in declared.values()]
    asked = sites_a_round(plan, len(declared)) / len(declared)  # of the sites, on average
    shared = plan.privacy.noise == "shared"
    sigma = max(sigmas) if shared else math.sqrt(asked * sum(s * s for s in sigmas))
    return sigma, asked * sum(plan.expected_batch(units) for units in declared.values())


def _adapter_under_sgd(plan: Plan, declared: Mapping[str, int]) -> Iterator[str]:
    """No rule fills this rate in: it hangs on how many units a step has."""
    adapts = plan.lora.target_modules != "none" and plan.head_rounds == 0 and plan.sends_sums
    if not adapts or plan.optimizer.server.name != "sgd":
        return
    bounds = plan.privacy.clipping.bounds
    bound = bounds.get("all") or bounds["adapter"]
    sigma, units = _sum_of_step(plan, declared)
    usual = adapter_lr_under_sgd(plan, noise=sigma * bound.norm / units)
    rate = plan.optimizer.site.adapter_lr
    if not usual / _FAR <= rate <= usual * _FAR:
        much = "small" if rate < usual else "large"
        yield (
            f"optimizer.site.adapter_lr = {rate:g} is {much} for this plan: under SGD, with {units:.0f} "
            f"units a step, noise moves an adapter at {usual:g} as far as by the rule under Adam"
        )


def _signals(plan: Plan, layout: Layout, declared: Mapping[str, int]) -> Iterator[str]:
    for name, (step, numbers, rounds) in signals(plan, layout, declared).items():
        whole = step * math.sqrt(rounds)
        if whole >= _LOST:
            continue
        group = {"all": "what is trained"}.get(name, f"the {name}")
        yield (
            f"the signal of a step is far below its noise for {group}: at most {step:.2g} of it, and "
            f"{whole:.2g} over {rounds} rounds, where under {_LOST:g} most of what is learned is lost "
            f"(docs/accuracy.md). Train fewer than {numbers:,} numbers, with more units, or at a larger "
            "epsilon"
        )


def _features(plan: Plan) -> Iterator[str]:
    if plan.model.head_features is None:
        return
    if plan.data.split_by == "group":
        yield (
            "model.head_features: on groups that were never trained on cosines gained nothing; a head "
            "without them is smaller"
        )
    if len(plan.model.labels) > MOST_CURVED_LABELS:
        yield (
            f"model.head_features: with more than {MOST_CURVED_LABELS} labels cosines lost more to "
            "noise than they gained"
        )
