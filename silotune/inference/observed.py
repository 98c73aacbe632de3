"""Labelled records and what one or more trained models say of each of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silotune.data.table import Faults, numbered
from silotune.data.targets import number_of
from silotune.errors import TooFewRecords
from silotune.inference.figures import (
    Classified,
    CountedRecords,
    Estimated,
    FoundEntities,
    Ints,
    Observed,
    SeveralHold,
)
from silotune.inference.records import LabelledRecords
from silotune.models.task import LoadedModel
from silotune.plan.plan import Plan

_ALL_WINDOWS = 1000  # an evaluation reads all of a text, as `predict` does

NAMELESS = " row "
"""Before the number of a record that is of no named unit; no unit's name begins with a space."""

Examples = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenRecords:
    """A file of labelled records after models have seen it.

    Attributes
    ----------
    observed : sequence of Observed
        One a model.
    units : sequence of str
        The unit of each record: its number where the file names none.
    groups : sequence of str
        The group of each record; empty where the file names none.
    left_out : tuple of str
        Rows that were not looked at, and why.
    """

    observed: Sequence[Observed]
    units: Sequence[str]
    groups: Sequence[str]
    left_out: tuple[str, ...]

    @property
    def unit_of(self) -> Ints:
        """The unit of each record as a number, in the order of first appearance."""
        found, _ = numbered(self.units)
        return found

    @property
    def rows(self) -> Ints:
        """All records."""
        return np.arange(len(self.units))


def look(
    models: Sequence[LoadedModel],
    source: LabelledRecords,
    *,
    advance: Callable[[int], None] = lambda records: None,
) -> SeenRecords:
    """Let models see labelled records, some at a time.

    Raises
    ------
    TooFewRecords
        None of them can be used.
    RecordInvalid
        A target is not what the task asks for.
    """
    seen = _Seen(models, source)
    for some in source.some():
        seen.add(some.examples, some.rows)
        seen.faults.found.extend(some.left_out)
        advance(some.records)
    return seen.looked()


def _same(examples: Examples, plan: Plan) -> NDArray[np.float64]:
    """Of records whose truth is in what is counted of them."""
    return np.zeros(len(examples))


def _label(examples: Examples, plan: Plan) -> NDArray[np.float64]:
    places = {label: at for at, label in enumerate(plan.model.labels)}
    return np.array([places[example["label"]] for example in examples], dtype=np.float64)


def _labels(examples: Examples, plan: Plan) -> NDArray[np.float64]:
    named = [set(json.loads(example["labels"])) for example in examples]
    return np.array([[label in names for label in plan.model.labels] for names in named], float)


def _number(examples: Examples, plan: Plan) -> NDArray[np.float64]:
    return np.array([number_of(example[plan.task.target]) for example in examples])


def _shares(model: LoadedModel, examples: Examples) -> NDArray[np.float64]:
    """Probabilities [records, labels]."""
    labels = model.plan.model.labels
    found = model.task.predict(model, _asked(model, examples))
    return np.array([[one.probabilities[label] for label in labels] for one in found])


def _estimates(model: LoadedModel, examples: Examples) -> NDArray[np.float64]:
    """Numbers [records]."""
    return np.array([one.output for one in model.task.predict(model, _asked(model, examples))])


def _counts(model: LoadedModel, examples: Examples) -> NDArray[np.float64]:
    """Counts [records, ...]."""
    task, plan = model.task, model.plan
    if plan.task.each_token:
        plan = plan.override({"data.max_windows": _ALL_WINDOWS})
    encoded = task.encode(examples, model.tokenizer, plan=plan)
    rows = range(len(examples))
    return np.stack(
        [
            task.score(model.module, task.collate(encoded, [row], model.device)).ravel()
            for row in rows
        ]
    )


def _asked(model: LoadedModel, examples: Examples) -> list[dict[str, str]]:
    return [{role: example[role] for role in model.plan.task.reads} for example in examples]


Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What is true of records of a task, what a model says of them, and how the two are measured."""

    truth: Callable[[Examples, Plan], Array]
    said: Callable[[LoadedModel, Examples], Array]
    observed: Callable[[Array, Array, Plan], Observed]


_COUNTED = _Kind(
    truth=_same,
    said=_counts,
    observed=lambda truth, said, plan: CountedRecords(counts=said, plan=plan),
)
_KINDS: Mapping[str, _Kind] = {
    "confusion": _Kind(
        truth=_label,
        said=_shares,
        observed=lambda truth, said, plan: Classified(
            truth=truth.astype(np.int64), shares=said, names=plan.model.labels
        ),
    ),
    "cells": _Kind(
        truth=_labels,
        said=_shares,
        observed=lambda truth, said, plan: SeveralHold(
            truth=truth > 0, shares=said, names=plan.model.labels
        ),
    ),
    "errors": _Kind(
        truth=_number,
        said=_estimates,
        observed=lambda truth, said, plan: Estimated(truth=truth, said=said),
    ),
    "entities": _Kind(
        truth=_same,
        said=_counts,
        observed=lambda truth, said, plan: FoundEntities(counts=said, plan=plan),
    ),
}
"""By what `TaskFacts.counts` says; a task of another kind has its own metrics, of its counts."""


class _Seen:
    """Collects what was seen."""

    def __init__(self, models: Sequence[LoadedModel], source: LabelledRecords) -> None:
        self._plan = models[0].plan
        facts = self._plan.task
        self._models, self._source = models, source
        self._needed = facts.in_order
        self._kind = _KINDS.get(facts.counts, _COUNTED)
        self._truth: list[Array] = []
        self._parts: list[list[Array]] = [[] for _ in models]
        self._units: list[str] = []
        self._groups: list[str] = []
        self.faults = Faults(source.title)

    def add(self, examples: Examples, rows: Sequence[int]) -> None:
        """Take the records of a block that are whole."""
        kept = self._usable(examples, rows)
        if not kept:
            return
        named = [{role: examples[at][role] for role in self._needed} for at in kept]
        for parts, model in zip(self._parts, self._models, strict=True):
            parts.append(self._kind.said(model, named))
        self._truth.append(self._kind.truth(named, self._plan))
        for at in kept:
            self._units.append(examples[at].get("unit") or f"{NAMELESS}{rows[at]}")
            if self._source.group_column:
                self._groups.append(examples[at]["group"] or "(none)")

    def _usable(self, examples: Examples, rows: Sequence[int]) -> list[int]:
        left = list(range(len(examples)))

        def drop(odd: set[int], problem: str) -> None:
            self.faults.add(problem, [rows[at] for at in sorted(odd)])
            left[:] = [at for at in left if at not in odd]

        for role in self._needed:
            drop({at for at in left if not examples[at][role].strip()}, f"empty {role}")
        labels, target = self._plan.model.labels, self._plan.model.target
        if self._plan.task.target == "label":
            odd = {at for at in left if examples[at]["label"] not in labels}
            drop(odd, "label is not one of model.labels")
        if target is not None:
            numbers = {at: number_of(examples[at]["value"]) for at in left}
            drop({at for at in left if math.isnan(numbers[at])}, "value is not a number")
            odd = {at for at in left if not target.lower <= numbers[at] <= target.upper}
            drop(odd, "value is not within model.target")
        return left

    def looked(self) -> SeenRecords:
        """All of it."""
        if not self._units:
            raise TooFewRecords(
                f"{self._source.title}: no record has all that the task needs",
                remedy="Name the columns with --column, and give records that have them.",
            )
        truth = np.concatenate(self._truth)
        return SeenRecords(
            observed=[
                self._kind.observed(truth, np.concatenate(part), self._plan) for part in self._parts
            ],
            units=self._units,
            groups=self._groups,
            left_out=tuple(dict.fromkeys(map(str, _merged(self.faults).found))),
        )


def _merged(faults: Faults) -> Faults:
    """The faults of all blocks, those of one kind together."""
    rows: dict[tuple[str, str | None], list[int]] = {}
    for fault in faults.found:
        rows.setdefault((fault.problem, fault.column), []).extend(fault.rows)
    found = Faults(faults.source)
    for (problem, column), numbers in rows.items():
        found.add(problem, numbers, column=column)
    return found
