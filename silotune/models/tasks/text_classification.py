"""Single-label text classification: a linear head on the pooled features of a backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from silotune.errors import RecordInvalid
from silotune.models.batching import Batch, Encoded, Rows, batches, padding_id, text_ids
from silotune.models.prediction import Prediction
from silotune.models.task import LoadedModel, TaskModel
from silotune.plan.plan import Plan

_PREDICT_BATCH = 64


class TextClassification:
    """Cross-entropy of one label a text."""

    def example(self, text: str, *, number: int, plan: Plan) -> dict[str, str]:
        """A text with a label of the plan."""
        labels = plan.model.labels
        return {"text": text, "label": labels[number % len(labels)]}

    def encode(
        self, examples: Sequence[Mapping[str, str]], tokenizer: Any, *, plan: Plan
    ) -> Encoded:
        """Token ids, cut at ``data.max_length``, and label indices.

        Raises
        ------
        RecordInvalid
            A label is not one of the plan's; the message counts examples and quotes none.
        """
        index = {label: i for i, label in enumerate(plan.model.labels)}
        targets = [index.get(example["label"], -1) for example in examples]
        if unknown := targets.count(-1):
            raise RecordInvalid(
                f"{unknown} of {len(targets)} examples have a label that is not in model.labels"
            )
        return self.inputs(examples, targets, tokenizer, plan)

    def inputs(
        self,
        examples: Sequence[Mapping[str, str]],
        targets: Sequence[int],
        tokenizer: Any,
        plan: Plan,
    ) -> Encoded:
        """What the model reads of examples, with their targets."""
        texts = [example["text"] for example in examples]
        ids = text_ids(tokenizer, texts, limit=plan.data.max_length)
        return Encoded.of(ids, targets, padding_id(tokenizer))

    def collate(self, encoded: Encoded, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` [n, longest], padded right, and ``targets`` [n]."""
        return encoded.padded(rows, device) | {"targets": _targets(encoded, rows, device)}

    def losses(self, model: TaskModel, batch: Batch) -> Tensor:
        """Cross-entropy of each text, float32 of shape [n]."""
        return cross_entropy(model(batch), batch["targets"], reduction="none")

    def head_losses(
        self, model: TaskModel, features: Tensor, encoded: Encoded, rows: Rows
    ) -> Tensor:
        """Cross-entropy of each text from its features [n, hidden], shape [n]."""
        targets = _targets(encoded, rows, features.device)
        return cross_entropy(model.logits(features), targets, reduction="none")

    def score(
        self, model: TaskModel, batch: Batch, *, cap: float = math.inf
    ) -> NDArray[np.float64]:
        """Confusion matrix of a batch [labels, labels], rows true, columns predicted."""
        del cap  # a text is one cell
        with model.inference():
            return _confusion(model(batch), batch["targets"])

    def head_score(
        self, model: TaskModel, features: Tensor, encoded: Encoded, rows: Rows
    ) -> NDArray[np.float64]:
        """Confusion matrix from features [n, hidden] of the given rows."""
        with model.inference():
            return _confusion(model.logits(features), _targets(encoded, rows, features.device))

    def predict(
        self, model: LoadedModel, examples: Sequence[Mapping[str, str]]
    ) -> list[Prediction]:
        """Label and probabilities of each text, in the order given."""
        labels, number = model.plan.model.labels, len(examples)
        encoded = self.inputs(examples, [0] * number, model.tokenizer, model.plan)
        found: dict[int, Prediction] = {}
        for rows in batches(encoded, range(number), size=_PREDICT_BATCH):
            with model.module.inference():
                logits = model.module(self.collate(encoded, rows, model.device))
            for row, shares in zip(rows, logits.softmax(1).tolist(), strict=True):
                best = labels[int(np.argmax(shares))]
                found[row] = Prediction(
                    output=best, probabilities=dict(zip(labels, shares, strict=True))
                )
        return [found[row] for row in range(number)]


def _targets(encoded: Encoded, rows: Rows, device: torch.device) -> Tensor:
    return torch.from_numpy(encoded.targets[np.asarray(rows, dtype=np.int64)]).to(device)


def _confusion(logits: Tensor, targets: Tensor) -> NDArray[np.float64]:
    size = logits.shape[1]
    cells = torch.bincount(targets * size + logits.argmax(1), minlength=size * size)
    return cells.reshape(size, size).cpu().numpy().astype(np.float64)
