"""The tasks that a plan may name, in one table that plans, sites and the coordinator all ask.

A new task is its file in `silotune.models.tasks`, its line there and its line in `TASKS` here. What is
here needs none of the libraries that a model is made with.

Counts are what a task tells of held-out records: numbers that add up over batches and sites.
`silotune.models.scores` makes metrics of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

LOSS_CAP = 10.0
"""No text counts with a larger loss, or with more entities (an L2 norm), where counts leave a site."""


class Chosen(Protocol):
    """What sizes follow from: the ``[model]`` section of a plan."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The plan's labels."""


@dataclass(frozen=True)
class Metric:
    """A score of a task, and its direction."""

    key: str
    title: str
    higher_is_better: bool

    def gain(
        self, new: Mapping[str, float] | None, old: Mapping[str, float] | None
    ) -> float | None:
        """How much better `new` is than `old`; None where either is unknown."""
        if not new or not old or self.key not in new or self.key not in old:
            return None
        difference = new[self.key] - old[self.key]
        return difference if self.higher_is_better else -difference


MACRO_F1 = Metric("macro_f1", "macro-F1", higher_is_better=True)
ACCURACY = Metric("accuracy", "accuracy", higher_is_better=True)
ENTITY_F1 = Metric("entity_f1", "entity F1", higher_is_better=True)
ENTITY_RECALL = Metric("entity_recall", "entity recall", higher_is_better=True)
ENTITY_PRECISION = Metric("entity_precision", "entity precision", higher_is_better=True)
LOSS = Metric("loss", "loss", higher_is_better=False)
PERPLEXITY = Metric("perplexity", "perplexity", higher_is_better=False)


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What a task is: what it reads, what is trained, and what it is measured by.

    Attributes
    ----------
    roles : frozenset of str
        Roles of the columns that a dataset must have.
    reads : tuple of str
        Roles of what the model is given, in their order: what `predict` asks for.
    target : str
        Role of what is learned.
    base : str
        What is loaded of the base model: "encoder" (its hidden states), "decoder" (a causal language
        model with its vocabulary) or "image" (an encoder of images).
    pools : bool
        Whether a head sees vectors of a record that don't hang on what it answers: it can then be
        trained alone, on features that are computed once, and through random features.
    each_token : bool
        Whether these are the vectors of each token, and not one. Long texts are then read in windows,
        and one label is enough.
    has_head : bool
        Whether a head is trained beside the adapter; always, where one pools.
    has_labels : bool
        Whether the plan has labels: two at least.
    outputs : callable
        Width of the head.
    shape, sensitivity : callable
        Of the counts; sensitivity is the L2 norm of the most that one record adds to them.
    counts : str
        Which function of `silotune.models.scores` makes metrics of them.
    metrics : tuple of Metric
        What it makes. The first decides; the second stands beside it.
    learns : str
        What is learned, after "to": with ``{labels}`` and ``{text}``, what a head sees.
    tag : str
        The pipeline's name in a model card.
    rounds : int
        That learning needs, with one step each, where it was measured.
    """

    roles: frozenset[str]
    reads: tuple[str, ...]
    target: str
    base: Literal["encoder", "decoder", "image"] = "encoder"
    pools: bool = True
    each_token: bool = False
    has_head: bool = True
    has_labels: bool = True
    outputs: Callable[[Chosen], int] = lambda model: len(model.labels)
    shape: Callable[[Chosen], tuple[int, ...]]
    sensitivity: Callable[[Chosen], float]
    counts: str
    metrics: tuple[Metric, ...]
    learns: str
    tag: str
    rounds: int = 120

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return bool(self.metrics)

    @property
    def sees(self) -> bool:
        """Whether it reads images instead of texts."""
        return self.base == "image"

    @property
    def generates(self) -> bool:
        """Whether the answer is written by the base model itself."""
        return self.base == "decoder"


TASKS: Mapping[str, TaskFacts] = {
    "text_classification": TaskFacts(
        roles=frozenset({"text", "label"}),
        reads=("text",),
        target="label",
        shape=lambda model: (len(model.labels), len(model.labels)),
        sensitivity=lambda model: 1.0,  # a record is one cell
        counts="confusion",
        metrics=(MACRO_F1, ACCURACY),
        learns="tell {labels} apart by {text}",
        tag="text-classification",
    ),
    "token_classification": TaskFacts(
        roles=frozenset({"text", "spans"}),
        reads=("text",),
        target="spans",
        each_token=True,
        outputs=lambda model: 2 * len(model.labels) + 1,  # outside, begin and inside of each
        shape=lambda model: (3 * len(model.labels) + 1,),
        sensitivity=lambda model: math.hypot(LOSS_CAP, 1.0),  # its entities, and one record
        counts="entities",
        metrics=(ENTITY_F1, ENTITY_RECALL, ENTITY_PRECISION),
        learns="find {labels} in a text",
        tag="token-classification",
    ),
    "image_classification": TaskFacts(
        roles=frozenset({"image", "label"}),
        reads=("image",),
        target="label",
        base="image",
        shape=lambda model: (len(model.labels), len(model.labels)),
        sensitivity=lambda model: 1.0,  # a record is one cell
        counts="confusion",
        metrics=(MACRO_F1, ACCURACY),
        learns="tell {labels} apart by {text}",
        tag="image-classification",
    ),
    "causal_lm": TaskFacts(
        roles=frozenset({"prompt", "response"}),
        reads=("prompt",),
        target="response",
        base="decoder",
        pools=False,
        has_head=False,
        has_labels=False,
        outputs=lambda model: 0,
        shape=lambda model: (2,),
        sensitivity=lambda model: math.hypot(LOSS_CAP, 1.0),
        counts="losses",
        metrics=(LOSS, PERPLEXITY),
        learns="answer a prompt with a response",
        tag="text-generation",
        rounds=40,
    ),
}
"""Every task that trains a model, by its name in a plan."""


def of_chats(facts: TaskFacts) -> TaskFacts:
    """The same task on records that are chats."""
    return replace(
        facts,
        roles=frozenset({"messages"}),
        reads=("messages",),
        target="",
        learns="answer as the assistants of chats do",
    )


STATISTICS = TaskFacts(
    roles=frozenset(),
    reads=(),
    target="",
    pools=False,
    has_head=False,
    has_labels=False,
    outputs=lambda model: 0,
    shape=lambda model: (0,),
    sensitivity=lambda model: 0.0,
    counts="",
    metrics=(),
    learns="",
    tag="",
)
"""Of a plan that counts and trains nothing; its roles are what it counts (`Sections.roles`)."""

METRICS: tuple[Metric, ...] = tuple(
    dict.fromkeys(metric for facts in TASKS.values() for metric in facts.metrics)
)
"""Every metric; of those that a run has, the first is the one that decides."""
