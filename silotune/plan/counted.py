"""What a statistics plan counts: the parts of what a unit adds, what excludes them, and words for them.

Each unit adds one vector. It has a part for everything that is counted, each of length 1 at most. All
parts have equal shares of the squared sensitivity: with P parts each is divided by the root of P, so
that the whole vector has length 1 at most. That is the ``clip`` of the plan, and the sum over all units
is one Gaussian release.

- *units*: 1.
- *labels*, *lengths*, *records a unit*, a number's *histogram*: one number a bin. A unit with several
  records divides its 1 among them, so each unit counts once, however many records it has.
- *mean* of a number: the mean of the unit's values, clipped to the declared bounds, from -1 to 1, and 1
  for having any; both divided by the root of 2.

A plan that has a vote (`silotune.plan.voted`) has one part, *votes*: one number a candidate. A unit can
turn one block's vote from one candidate to another, which moves the sum by the root of 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from silotune.plan.sections import Sections
from silotune.plan.statistics import StatisticsSection

MOST_BINS = 10_000
"""Of a plan, all parts together."""

_MOST_UNITS = float(1 << 20)  # unless the plan says otherwise
_MARGIN = 2.0**-19  # of a unit's length: more than rounding can add in a sum of a million units


class CountedPart(NamedTuple):
    """One part of what a unit adds."""

    name: str
    size: int


def counted_parts(plan: Sections) -> tuple[CountedPart, ...]:
    """The parts of a unit's vector, in their order."""
    if plan.vote is not None:
        return (CountedPart("votes", len(plan.vote.candidates)),)
    return tuple(_parts(plan)) if plan.statistics is not None else ()


def _parts(plan: Sections) -> Iterator[CountedPart]:
    asked = plan.statistics
    assert asked is not None
    yield CountedPart("units", 1)
    if plan.model.labels:
        yield CountedPart("labels", len(plan.model.labels))
    if asked.records_a_unit:
        yield CountedPart("records_a_unit", len(asked.records_a_unit) + 1)
    if asked.lengths is not None:
        yield CountedPart("lengths", len(asked.lengths.edges) + 1)
    for name, number in sorted(asked.numbers.items()):
        yield CountedPart(f"numbers.{name}.mean", 2)
        if number.edges:
            yield CountedPart(f"numbers.{name}.histogram", len(number.edges) + 1)


def number_key(name: str) -> str:
    """Under which records have the value of a number that sites offer as `name`."""
    return f"numbers.{name}"


def part_scale(plan: Sections) -> float:
    """What each part is multiplied by: a unit then moves the sum by a length of 1 at most."""
    squared = 2 if plan.vote is not None else len(counted_parts(plan))
    return (1.0 - _MARGIN) / math.sqrt(squared)


def units_with_room(plan: Sections) -> float:
    """Units of one site that a sum of whole numbers has room for."""
    given = plan.aggregation.update_bound
    return _MOST_UNITS if given is None else given


# --- what it can't stand beside ---------------------------------------------------------------------


def statistics_conflicts(plan: Sections) -> list[str]:
    """Settings that statistics exclude, and those that need them."""
    counts = plan.model.task == "statistics"
    if not counts:
        found = [] if plan.model.base else ["model.base: missing, and it has no default"]
        if plan.statistics is not None:
            found.append("statistics: only when model.task is 'statistics'; remove it")
        return found
    if plan.statistics is None:
        return ["statistics: needed when model.task is 'statistics': say what is to be counted"]
    return [*_excluded(plan), *_edges(plan, plan.statistics)]


_OF_ANY_SUM: tuple[tuple[str, object, str], ...] = (
    ("privacy.mode", "record", "nothing is counted without noise"),
    ("privacy.rate", 1.0, "every unit is counted once"),
    ("privacy.clip", 1.0, "what a unit adds has length 1 at most"),
    ("privacy.max_records_per_unit", 1, "a unit counts once, whatever it has"),
    ("privacy.metrics_share", 0.0, "all of epsilon is spent on what is counted"),
    ("rounds.number", 1, "everything is counted in one round"),
    ("rounds.local_steps", 1, "everything is counted in one round"),
    ("rounds.evaluate_every", 0, "there is nothing to evaluate"),
    ("optimizer.site.head_rounds", 0, "nothing is trained"),
    ("aggregation.strategy", "fedavg", "sums are added, and no strategy is needed"),
    ("aggregation.weights", "declared", "sums are added as they are"),
    ("aggregation.head", "shared", "nothing is trained"),
)
_OF_STATISTICS: tuple[tuple[str, object, str], ...] = (
    ("data.test_share", 0.0, "every record is counted, and none held out"),
    ("data.validation_share", 0.0, "every record is counted, and none held out"),
    ("data.split_by", "unit", "nothing is held out"),
    ("model.quantization", "none", "no weight is read"),
)


def fixed_for_sums(
    plan: Sections, *, when: str, more: tuple[tuple[str, object, str], ...] = ()
) -> Iterator[str]:
    """Settings that are fixed where sites answer with one sum, and are others in a plan."""
    for key, wanted, reason in (*_OF_ANY_SUM, *more):
        table, _, leaf = key.rpartition(".")
        said: object = plan
        for part in table.split("."):
            said = getattr(said, part)
        if getattr(said, leaf) != wanted:
            shown = f"'{wanted}'" if isinstance(wanted, str) else f"{wanted:g}"
            yield f"{key}: must be {shown} {when}: {reason}"


def _excluded(plan: Sections) -> Iterator[str]:
    yield from fixed_for_sums(plan, when="when model.task is 'statistics'", more=_OF_STATISTICS)
    tokens = plan.statistics is not None and plan.statistics.lengths is not None
    tokens = tokens and plan.statistics.lengths.counted == "tokens"  # type: ignore[union-attr]
    if tokens and not plan.model.base:
        yield "model.base: needed for statistics.lengths.counted = 'tokens': its tokenizer counts"
    if plan.model.base and not tokens:
        yield (
            "model.base: no model takes part in statistics; remove it, or count lengths in tokens "
            "with statistics.lengths.counted = 'tokens'"
        )
    if plan.model.sha256 and not plan.model.base:
        yield "model.sha256: there is no model.base; remove it"


def _edges(plan: Sections, asked: StatisticsSection) -> Iterator[str]:
    if asked.records_a_unit and plan.privacy.unit == "record":
        yield "statistics.records_a_unit: a unit is one record when privacy.unit is 'record'; remove it"
    least = {"statistics.records_a_unit": asked.records_a_unit}
    if asked.lengths is not None:
        least["statistics.lengths.edges"] = asked.lengths.edges
    for key, edges in least.items():
        if any(edge < 1 or edge != int(edge) for edge in edges):
            yield f"{key}: whole numbers from 1 on"
    for name, number in asked.numbers.items():
        key = f"statistics.numbers.{name}"
        least[f"{key}.edges"] = number.edges
        if not number.lower < number.upper:
            yield f"{key}.upper: must be above lower"
        elif any(not number.lower < edge < number.upper for edge in number.edges):
            yield f"{key}.edges: must lie between lower and upper"
    for key, edges in least.items():
        if any(a >= b for a, b in pairwise(edges)):
            yield f"{key}: must rise"
    if sum(part.size for part in counted_parts(plan)) > MOST_BINS:
        yield f"statistics: more than {MOST_BINS} numbers would be released"
    if len(counted_parts(plan)) == 1:
        yield "statistics: nothing is counted; give model.labels, lengths, records_a_unit or numbers"


# --- in words -----------------------------------------------------------------------------------------


def statistics_in_words(plan: Sections) -> str:
    """What is released, for who must approve it."""
    asked, unit = plan.statistics, plan.privacy.unit
    assert asked is not None
    told = [f"the number of {unit}s"]
    if plan.model.labels:
        told.append(f"how often each label occurs ({', '.join(plan.model.labels)})")
    if asked.records_a_unit:
        told.append(f"how many records a {unit} has, in {len(asked.records_a_unit) + 1} groups")
    if asked.lengths is not None:
        lengths = asked.lengths
        told.append(
            f"how long a {lengths.of} is, in {lengths.counted}, in {len(lengths.edges) + 1} groups"
        )
    for name, number in sorted(asked.numbers.items()):
        found = f"the mean of {name} from {number.lower:g} to {number.upper:g}"
        if number.edges:
            found += f" and how it is spread over {len(number.edges) + 1} groups"
        told.append(found)
    sizes = sum(part.size for part in counted_parts(plan))
    whose = "all sites together" if plan.aggregation.secure else "each site by itself"
    return (
        f"Released for {whose}, with noise on each of {sizes} numbers: {'; '.join(told)}. Each {unit} "
        f"counts once, whatever it has. A group of fewer than about {asked.floor:g} {unit}s, or smaller "
        "than the noise, is not shown. No text, no model and no record leaves."
    )
