"""What a record is read for, as one text: what a model reads of it, and what it learns of it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from itertools import pairwise

import numpy as np

from silotune.models.spans import spans_in
from silotune.plan.sections import Sections, TargetSection
from silotune.plan.tasks import TaskFacts

Example = Mapping[str, str]


def number_of(text: str) -> float:
    """The number that a text is; NaN if it is none, or not finite."""
    try:
        found = float(text)
    except ValueError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def read_of(example: Example, plan: Sections) -> str:
    """All that a model reads of a record; of a response that it learns to write, that too."""
    task = plan.task
    roles = task.in_order if task.generates else task.reads
    return "\n".join(example[role] for role in roles)


def kind_of(example: Example, plan: Sections) -> str:
    """What is learned of a record: its label, its labels, or the bin of its number; else ""."""
    task = plan.task
    if not has_kinds(plan):
        return ""
    if (target := plan.model.target) is not None:
        return bins(target)[int(np.digitize(number_of(example[task.target]), target.inner_edges))]
    return example[task.target]


def has_kinds(plan: Sections) -> bool:
    """Whether what is learned tells a record from another: not what stands where in a text."""
    return plan.task.pools and not plan.task.each_token


def labels_in(target: str, task: TaskFacts) -> Collection[str]:
    """The labels that a target names: one, several, or those of spans."""
    if task.target == "spans":
        return {span.label for span in spans_in(target)} if target else set()
    found: list[str] = json.loads(target) if task.target == "labels" else [target]
    return found


def bins(target: TargetSection) -> list[str]:
    """Names of the bins of a number."""
    edges = (target.lower, *target.inner_edges, target.upper)
    return [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
