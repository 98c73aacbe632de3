"""The tasks that a plan can name, one file each.

`silotune.plan.tasks` has what is known of each without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from silotune.models.answers import answer_of
from silotune.models.task import Task
from silotune.models.tasks.causal_lm import CausalLm
from silotune.models.tasks.chat import Chat
from silotune.models.tasks.image_classification import ImageClassification
from silotune.models.tasks.pair_classification import PairClassification
from silotune.models.tasks.text_classification import TextClassification
from silotune.models.tasks.token_classification import TokenClassification
from silotune.plan.plan import Plan

_TASKS: Mapping[str, Callable[[Plan], Task]] = {
    "text_classification": lambda plan: TextClassification(answer_of(plan)),
    "text_regression": lambda plan: TextClassification(answer_of(plan)),  # a text, and a number
    "pair_classification": lambda plan: PairClassification(answer_of(plan)),
    "token_classification": lambda plan: TokenClassification(),
    "image_classification": lambda plan: ImageClassification(answer_of(plan)),
    "causal_lm": lambda plan: CausalLm() if plan.model.chat is None else Chat(chat=plan.model.chat),
}


def get_task(plan: Plan) -> Task:
    """The task that a plan names, as the plan has it."""
    return _TASKS[plan.model.task](plan)
