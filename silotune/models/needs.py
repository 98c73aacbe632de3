"""What each task needs of a dataset: known without the libraries that a task is made with."""

from __future__ import annotations

from dataclasses import dataclass

from silotune.plan.counted import roles_counted
from silotune.plan.plan import Plan


@dataclass(frozen=True)
class TaskNeeds:
    """What is asked of a dataset, and whether a head is trained.

    Attributes
    ----------
    roles : frozenset of str
        Roles of the columns that a dataset must have.
    has_head : bool
        Whether a classification head is trained beside the adapter.
    """

    roles: frozenset[str]
    has_head: bool


NEEDS = {
    "text_classification": TaskNeeds(frozenset({"text", "label"}), True),
    "causal_lm": TaskNeeds(frozenset({"prompt", "response"}), False),
}
"""By the task's name, of those that train a model."""


def needs_of(plan: Plan) -> TaskNeeds:
    """What the plan's task needs; the plan has validated its name."""
    if plan.statistics is not None:
        return TaskNeeds(roles_counted(plan), False)
    return NEEDS[plan.model.task]
