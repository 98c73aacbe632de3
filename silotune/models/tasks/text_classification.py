"""A head on the pooled features of a text; `silotune.models.answers` says what it may answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silotune.models.answers import Answer, Targets
from silotune.models.batching import Batch, Encoded, Rows, batches, padding_id, text_ids
from silotune.models.prediction import Prediction
from silotune.models.task import LoadedModel, TaskModel
from silotune.plan.plan import Plan

_PREDICT_BATCH = 64


@dataclass(frozen=True)
class TextClassification:
    """A linear head on the features of a text.

    Attributes
    ----------
    answer : Answer
        What the head answers, its loss and what is counted of it.
    """

    answer: Answer

    def example(self, text: str, *, number: int, plan: Plan) -> dict[str, str]:
        """A text with a target of the plan."""
        del plan
        return {"text": text, **self.answer.example(number)}

    def encode(
        self, examples: Sequence[Mapping[str, str]], tokenizer: Any, *, plan: Plan
    ) -> Encoded:
        """What the model is given of each example, and the answer's targets. Raises `RecordInvalid`."""
        return self.inputs(examples, self.answer.targets(examples), tokenizer, plan)

    def inputs(
        self, examples: Sequence[Mapping[str, str]], targets: Targets, tokenizer: Any, plan: Plan
    ) -> Encoded:
        """Token ids of the texts, cut at ``data.max_length``."""
        texts = [example["text"] for example in examples]
        ids = text_ids(tokenizer, texts, limit=plan.data.max_length)
        return Encoded.of(ids, targets, padding_id(tokenizer))

    def collate(self, encoded: Encoded, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` [n, longest], padded right, and ``targets``."""
        return encoded.padded(rows, device) | {"targets": _targets(encoded, rows, device)}

    def losses(self, model: TaskModel, batch: Batch) -> Tensor:
        """The answer's loss of each record, float32 of shape [n]."""
        return self.answer.losses(model(batch), batch["targets"])

    def head_losses(
        self, model: TaskModel, features: Tensor, encoded: Encoded, rows: Rows
    ) -> Tensor:
        """The same from the features [n, hidden] of the given rows."""
        targets = _targets(encoded, rows, features.device)
        return self.answer.losses(model.logits(features), targets)

    def score(
        self, model: TaskModel, batch: Batch, *, cap: float = math.inf
    ) -> NDArray[np.float64]:
        """The answer's counts of a batch."""
        del cap  # what a record adds is bounded without
        with model.inference():
            return self.answer.counts(model(batch), batch["targets"])

    def head_score(
        self, model: TaskModel, features: Tensor, encoded: Encoded, rows: Rows
    ) -> NDArray[np.float64]:
        """The same from the features [n, hidden] of the given rows."""
        with model.inference():
            targets = _targets(encoded, rows, features.device)
            return self.answer.counts(model.logits(features), targets)

    def predict(
        self, model: LoadedModel, examples: Sequence[Mapping[str, str]]
    ) -> list[Prediction]:
        """The answer of each example, in the order given."""
        targets = self.answer.nothing(len(examples))
        encoded = self.inputs(examples, targets, model.tokenizer, model.plan)
        found: dict[int, Prediction] = {}
        for rows in batches(encoded, range(len(examples)), size=_PREDICT_BATCH):
            with model.module.inference():
                logits = model.module(self.collate(encoded, rows, model.device))
            found |= zip(rows, self.answer.predictions(logits), strict=True)
        return [found[row] for row in range(len(examples))]


def _targets(encoded: Encoded, rows: Rows, device: torch.device) -> Tensor:
    return torch.from_numpy(encoded.targets[np.asarray(rows, dtype=np.int64)]).to(device)
