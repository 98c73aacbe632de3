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


class Bins(Protocol):
    """What a plan says of a number that is learned."""

    @property
    def inner_edges(self) -> tuple[float, ...]:
        """Where a new bin of its histogram begins."""


class Chosen(Protocol):
    """What sizes follow from: the ``[model]`` section of a plan."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The plan's labels."""

    @property
    def target(self) -> Bins | None:
        """The number that is learned, if it is one."""


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
MICRO_F1 = Metric("micro_f1", "micro-F1", higher_is_better=True)
MAE = Metric("mae", "MAE", higher_is_better=False)
R2 = Metric("r2", "R\N{SUPERSCRIPT TWO}", higher_is_better=True)
SPEARMAN = Metric("spearman", "Spearman", higher_is_better=True)

SUMS_OF_ERRORS = 5
"""Numbers that the counts of a regression begin with: see `silotune.models.scores.of_errors`."""

SUMS_OF_LABEL = 3
"""Numbers of each label where a record has several: see `silotune.models.scores.of_cells`."""


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
        Whether the plan has labels: two at least, or one where a record may have several.
    outputs : callable
        Width of the head.
    shape, sensitivity : callable
        Of the counts; sensitivity is the L2 norm of the most that one record adds to them.
    counts : str
        Which function of `silotune.models.scores` makes metrics of them.
    metrics : tuple of Metric
        What it makes. The first decides.
    judged : int
        By how many of the first ones a model is told better or worse.
    trivial : tuple of str
        What needs no training: at the head of a column, and in a sentence.
    learns : str
        What is learned, after "to": with ``{labels}`` and ``{text}``, what a head sees.
    tag : str
        The pipeline's name in a model card.
    card : str
        Whose code is in the model card, where it is another task's.
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
    judged: int = 1
    trivial: tuple[str, str] = ("base model", "the base model as it came")
    card: str = ""
    rounds: int = 120

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return bool(self.metrics)

    @property
    def in_order(self) -> tuple[str, ...]:
        """Roles of a labelled record: what the model is given, then what is learned."""
        return (*self.reads, *([self.target] if self.target else []))

    @property
    def compares(self) -> bool:
        """Whether several texts are read together."""
        return len(self.reads) > 1

    @property
    def sees(self) -> bool:
        """Whether it reads images instead of texts."""
        return self.base == "image"

    @property
    def generates(self) -> bool:
        """Whether the answer is written by the base model itself."""
        return self.base == "decoder"


def _bins(model: Chosen) -> int:
    return 0 if model.target is None else len(model.target.inner_edges) + 1


_CLASSES = TaskFacts(
    roles=frozenset({"text", "label"}),
    reads=("text",),
    target="label",
    shape=lambda model: (len(model.labels), len(model.labels)),
    sensitivity=lambda model: 1.0,  # a record is one cell
    counts="confusion",
    metrics=(MACRO_F1, ACCURACY),
    judged=2,
    trivial=("always one label", "the most frequent label for everything"),
    learns="tell {labels} apart by {text}",
    tag="text-classification",
    card="text_classification",
)
_PAIRS = replace(
    _CLASSES,
    roles=frozenset({"text", "text_b", "label"}),
    reads=("text", "text_b"),
    learns="tell {labels} apart by two texts, read together as {text}",
)

TASKS: Mapping[str, TaskFacts] = {
    "text_classification": _CLASSES,
    "text_regression": TaskFacts(
        roles=frozenset({"text", "value"}),
        reads=("text",),
        target="value",
        has_labels=False,
        outputs=lambda model: 1,
        shape=lambda model: (SUMS_OF_ERRORS + _bins(model) ** 2,),
        sensitivity=lambda model: math.sqrt(SUMS_OF_ERRORS + 1),  # each sum by 1, and one cell
        counts="errors",
        metrics=(MAE, R2, SPEARMAN),
        trivial=("always the mean", "the mean of the test records for everything"),
        learns="estimate a number {target} by {text}",
        tag="text-classification",
        card="text_classification",
    ),
    "pair_classification": _PAIRS,
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
    "image_classification": replace(
        _CLASSES,
        roles=frozenset({"image", "label"}),
        reads=("image",),
        base="image",
        tag="image-classification",
        card="",
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


def _several(facts: TaskFacts, learns: str) -> TaskFacts:
    """The same task where a record has any number of the labels."""
    return replace(
        facts,
        roles=facts.roles - {"label"} | {"labels"},
        target="labels",
        shape=lambda model: (len(model.labels) + 1, SUMS_OF_LABEL),
        # Of each label a record is found, missed or falsely found, or none of them; and it is one.
        sensitivity=lambda model: math.sqrt(len(model.labels) + 1.0),
        counts="cells",
        metrics=(MACRO_F1, MICRO_F1),
        trivial=("always every label", "every label for everything"),
        learns=learns,
    )


SEVERAL: Mapping[str, TaskFacts] = {
    "text_classification": _several(_CLASSES, "tell which of {labels} hold, by {text}"),
    "pair_classification": _several(
        _PAIRS, "tell which of {labels} hold, by two texts, read together as {text}"
    ),
}
"""What ``model.multi_label`` makes of the tasks that have it."""


def facts_of(name: str, *, several: bool = False) -> TaskFacts | None:
    """A task as a plan has it; None if there is none of the name."""
    return (SEVERAL.get(name) if several else None) or TASKS.get(name)


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
    dict.fromkeys(m for facts in (*TASKS.values(), *SEVERAL.values()) for m in facts.metrics)
)
"""Every metric; of those that a run has, the first is the one that decides."""
