"""Labelled records and what one or more trained models say of each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silotune.data.table import Faults, numbered
from silotune.errors import TooFewRecords
from silotune.inference.figures import Classified, CountedRecords, Ints, Observed
from silotune.inference.records import Given, examples_of
from silotune.models.task import LoadedModel

CLASSIFIED = "confusion"
"""The kind of counts of a task whose records have one label each."""


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
    models: Sequence[LoadedModel], given: Given, *, advance: Callable[[int], None]
) -> SeenRecords:
    """Let models see a file's records, block by block.

    Raises
    ------
    TooFewRecords
        None of them can be used.
    RecordInvalid
        A target is not what the task asks for.
    """
    seen = _Seen(models, given)
    for block, table in given.blocks():
        seen.add(examples_of(table), table.rows)
        seen.faults.found.extend(table.faults.found)
        advance(len(block.rows))
    return seen.looked()


class _Seen:
    """Collects what was seen."""

    def __init__(self, models: Sequence[LoadedModel], given: Given) -> None:
        facts, self._plan = models[0].plan.task, models[0].plan
        self._models, self._given = models, given
        self._target = str(facts.target)
        self._needed = (*facts.reads, self._target)
        self._places = {label: at for at, label in enumerate(self._plan.model.labels)}
        self._classifies = facts.counts == CLASSIFIED
        self._truth: list[int] = []
        self._parts: list[list[NDArray[np.float64]]] = [[] for _ in models]
        self._units: list[str] = []
        self._groups: list[str] = []
        self.faults = Faults(str(given.path))

    def add(self, examples: Sequence[dict[str, str]], rows: Sequence[int]) -> None:
        """Take the records of a block that are whole."""
        kept = self._usable(examples, rows)
        if not kept:
            return
        named = [{role: examples[at][role] for role in self._needed} for at in kept]
        for parts, model in zip(self._parts, self._models, strict=True):
            parts.append(self._said(model, named))
        if self._classifies:
            self._truth += [self._places[example[self._target]] for example in named]
        for at in kept:
            self._units.append(examples[at].get("unit") or f"row {rows[at]}")
            if "group" in self._given.roles:
                self._groups.append(examples[at]["group"] or "(none)")

    def _usable(self, examples: Sequence[dict[str, str]], rows: Sequence[int]) -> list[int]:
        left = list(range(len(examples)))
        for role in self._needed:
            empty = [at for at in left if not examples[at][role].strip()]
            self.faults.add(f"empty {role}", [rows[at] for at in empty])
            left = [at for at in left if at not in set(empty)]
        if self._classifies:
            odd = {at for at in left if examples[at][self._target] not in self._places}
            self.faults.add("label is not one of model.labels", [rows[at] for at in sorted(odd)])
            left = [at for at in left if at not in odd]
        return left

    def _said(self, model: LoadedModel, examples: Sequence[dict[str, str]]) -> NDArray[np.float64]:
        task = model.task
        if self._classifies:
            asked = [{role: e[role] for role in model.plan.task.reads} for e in examples]
            found = task.predict(model, asked)
            labels = self._plan.model.labels
            return np.array([[one.probabilities[label] for label in labels] for one in found])
        encoded = task.encode(examples, model.tokenizer, plan=model.plan)
        return np.stack(
            [
                task.score(model.module, task.collate(encoded, [row], model.device))
                for row in range(len(examples))
            ]
        )

    def looked(self) -> SeenRecords:
        """All of it."""
        if not self._units:
            raise TooFewRecords(
                f"{self._given.path}: no record has all that the task needs",
                remedy="Name the columns with --column, and give records that have them.",
            )
        labels = self._plan.model.labels
        parts = [np.concatenate(found) for found in self._parts]
        truth = np.array(self._truth, dtype=np.int64)
        observed: list[Observed] = [
            Classified(truth=truth, shares=part, names=labels)
            if self._classifies
            else CountedRecords(counts=part, plan=self._plan)
            for part in parts
        ]
        return SeenRecords(
            observed=observed,
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
