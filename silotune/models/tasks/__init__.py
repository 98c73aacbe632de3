"""The tasks that a plan can name, one file each."""

from __future__ import annotations

from silotune.models.task import Task
from silotune.models.tasks.causal_lm import CausalLm
from silotune.models.tasks.text_classification import TextClassification

_TASKS: dict[str, Task] = {"text_classification": TextClassification(), "causal_lm": CausalLm()}


def get_task(name: str) -> Task:
    """The task that ``model.task`` of a plan names; the plan has validated the name."""
    return _TASKS[name]
