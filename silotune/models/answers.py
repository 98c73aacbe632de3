"""What a head answers: one label, any number of labels, or a number; its loss and what is counted of it.

Losses are of one record each, and no record's depends on another. Class weights are the plan's own
public numbers: a weight multiplies a record's loss before its gradient is clipped, and so changes
nothing of what a privacy unit can do.

- *One label*: cross-entropy, times the weight of the record's label.
- *Several labels*: the sum over the labels of binary cross-entropies, each as if it were alone; where a
  label holds, its term is multiplied by its weight. A sum, and not a mean: the gradient of a label then
  does not shrink with the number of the others, and clipping bounds them together.
- *A number*: the cross-entropy of its place in the plan's range, from 0 to 1 (fractional logit, Papke
  and Wooldridge, 1996). Its gradient is the error, which the range bounds by 1 whatever a record says;
  the best answer to it is the mean; and an answer is always within the range.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from silotune.errors import RecordInvalid
from silotune.models.prediction import Prediction
from silotune.plan.plan import Plan
from silotune.plan.sections import TargetSection
from silotune.plan.tasks import SUMS_OF_ERRORS, SUMS_OF_LABEL

Counts = NDArray[np.float64]
Targets = NDArray[np.int64] | NDArray[np.float32]

_HOLDS = 0.5  # a label is answered from this probability on


class Answer(Protocol):
    """What a head of a task answers; logits are [n, width of the head]."""

    def example(self, number: int) -> dict[str, str]:
        """The target of a public example, by its role; they take turns by `number`."""

    def targets(self, examples: Sequence[Mapping[str, str]]) -> Targets:
        """What is learned of each example, [n] or [n, k].

        Raises
        ------
        RecordInvalid
            One is none of the plan; the message counts examples and quotes none.
        """

    def nothing(self, number: int) -> Targets:
        """Targets for so many examples that have none."""

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each record, [n]."""

    def counts(self, logits: Tensor, targets: Tensor) -> Counts:
        """What adds up over records, see `silotune.models.scores`."""

    def predictions(self, logits: Tensor) -> list[Prediction]:
        """What is answered of each record."""


def answer_of(plan: Plan) -> Answer:
    """What the head of a plan's task answers."""
    model = plan.model
    if plan.task.target == "value":
        assert model.target is not None  # validated
        return OneNumber(model.target)
    weights = tuple(model.class_weights.get(label, 1.0) for label in model.labels)
    return (SeveralLabels if model.multi_label else OneLabel)(model.labels, weights)


@dataclass(frozen=True)
class OneLabel:
    """One of the labels: targets are its number."""

    labels: tuple[str, ...]
    weights: tuple[float, ...]

    def example(self, number: int) -> dict[str, str]:
        """A label of the plan."""
        return {"label": self.labels[number % len(self.labels)]}

    def targets(self, examples: Sequence[Mapping[str, str]]) -> NDArray[np.int64]:
        """The label's number, int64 [n]. Raises `RecordInvalid`."""
        index = {label: i for i, label in enumerate(self.labels)}
        found = np.array([index.get(example["label"], -1) for example in examples], dtype=np.int64)
        if unknown := int(np.count_nonzero(found < 0)):
            raise _unknown(unknown, len(examples))
        return found

    def nothing(self, number: int) -> NDArray[np.int64]:
        """The first label."""
        return np.zeros(number, dtype=np.int64)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each record, times its label's weight."""
        found = cross_entropy(logits, targets, reduction="none")
        return found if _equal(self.weights) else found * _weights(self.weights, logits)[targets]

    def counts(self, logits: Tensor, targets: Tensor) -> Counts:
        """Confusion matrix [labels, labels], rows true, columns predicted."""
        size = logits.shape[1]
        cells = torch.bincount(targets * size + logits.argmax(1), minlength=size * size)
        return cells.reshape(size, size).cpu().numpy().astype(np.float64)

    def predictions(self, logits: Tensor) -> list[Prediction]:
        """The likeliest label, and the probability of each."""
        return [
            Prediction(
                output=self.labels[int(np.argmax(shares))],
                probabilities=dict(zip(self.labels, shares, strict=True)),
            )
            for shares in logits.softmax(1).tolist()
        ]


@dataclass(frozen=True)
class SeveralLabels:
    """Any number of the labels: targets are 1 for those that hold, and 0."""

    labels: tuple[str, ...]
    weights: tuple[float, ...]

    def example(self, number: int) -> dict[str, str]:
        """A label of the plan, and none in each fourth example."""
        label = self.labels[number % len(self.labels)]
        return {"labels": json.dumps([label] if number % 4 != 3 else [])}

    def targets(self, examples: Sequence[Mapping[str, str]]) -> NDArray[np.float32]:
        """1 where a label holds, float32 [n, labels]. Raises `RecordInvalid`."""
        index = {label: i for i, label in enumerate(self.labels)}
        found, unknown = self.nothing(len(examples)), 0
        for row, example in enumerate(examples):
            places = [index.get(label, -1) for label in json.loads(example["labels"])]
            unknown += -1 in places
            found[row, places] = 1.0
        if unknown:
            raise _unknown(unknown, len(examples))
        return found

    def nothing(self, number: int) -> NDArray[np.float32]:
        """No label."""
        return np.zeros((number, len(self.labels)), dtype=np.float32)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum of the labels' binary cross-entropies."""
        weights = None if _equal(self.weights) else _weights(self.weights, logits)
        each = binary_cross_entropy_with_logits(
            logits, targets, reduction="none", pos_weight=weights
        )
        return each.sum(1)

    def counts(self, logits: Tensor, targets: Tensor) -> Counts:
        """Records of each label that are found, missed and falsely found; then all records.

        Returns
        -------
        float64 array [labels + 1, 3]
            The last row is the number of records, and two zeros.
        """
        said, true = logits.sigmoid() >= _HOLDS, targets > 0
        found = np.zeros((len(self.labels) + 1, SUMS_OF_LABEL))
        for column, part in enumerate((said & true, ~said & true, said & ~true)):
            found[:-1, column] = part.sum(0).cpu().numpy()
        found[-1, 0] = len(logits)
        return found

    def predictions(self, logits: Tensor) -> list[Prediction]:
        """The labels that are likelier to hold than not, and the probability of each."""
        return [
            Prediction(
                output=[one for one, p in zip(self.labels, row, strict=True) if p >= _HOLDS],
                probabilities=dict(zip(self.labels, row, strict=True)),
            )
            for row in logits.sigmoid().tolist()
        ]


@dataclass(frozen=True)
class OneNumber:
    """A number: targets are its place in the plan's range, float32 [n, 1]."""

    target: TargetSection

    def example(self, number: int) -> dict[str, str]:
        """Numbers within the range, taking turns."""
        return {"value": repr(self.target.lower + self._width * (1 + number % 3) / 4)}

    def targets(self, examples: Sequence[Mapping[str, str]]) -> NDArray[np.float32]:
        """Places in the range, from 0 to 1. Raises `RecordInvalid`."""
        found = np.array([[float(example["value"])] for example in examples]).reshape(-1, 1)
        places = (found - self.target.lower) / self._width
        if beyond := int(np.count_nonzero(~((places >= 0.0) & (places <= 1.0)))):
            raise RecordInvalid(
                f"{beyond} of {len(examples)} examples have a value that is not within model.target"
            )
        return places.astype(np.float32)

    def nothing(self, number: int) -> NDArray[np.float32]:
        """The lowest number."""
        return np.zeros((number, 1), dtype=np.float32)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each record's place in the range."""
        return binary_cross_entropy_with_logits(logits, targets, reduction="none")[:, 0]

    def counts(self, logits: Tensor, targets: Tensor) -> Counts:
        """Sums of errors and of places, then a histogram: see `silotune.models.scores.of_errors`.

        All are of places in the range: each record adds 1 at most to each sum. An answer that is no
        number counts as the middle of the range.
        """
        said = logits[:, 0].double().sigmoid().nan_to_num(nan=0.5).cpu().numpy()
        true = targets[:, 0].double().cpu().numpy()
        errors = np.abs(said - true)
        sums = [len(true), errors.sum(), (errors**2).sum(), true.sum(), (true**2).sum()]
        assert len(sums) == SUMS_OF_ERRORS
        edges = [(edge - self.target.lower) / self._width for edge in self.target.inner_edges]
        size = len(edges) + 1
        cells = np.digitize(true, edges) * size + np.digitize(said, edges)
        return np.concatenate([sums, np.bincount(cells, minlength=size * size)]).astype(np.float64)

    def predictions(self, logits: Tensor) -> list[Prediction]:
        """The number that is expected."""
        places = logits[:, 0].double().sigmoid().tolist()
        return [Prediction(output=self.target.lower + self._width * place) for place in places]

    @property
    def _width(self) -> float:
        return self.target.upper - self.target.lower


def _unknown(number: int, examples: int) -> RecordInvalid:
    return RecordInvalid(
        f"{number} of {examples} examples have a label that is not in model.labels"
    )


def _equal(weights: tuple[float, ...]) -> bool:
    return all(weight == 1.0 for weight in weights)


def _weights(weights: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(weights, dtype=like.dtype, device=like.device)
