"""What a task is: records to tokens, tokens to losses, predictions to counts.

Tasks hold no state. A new one is one file in ``silotune/models/tasks`` and a line in its registry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silotune.plan.plan import Plan

if TYPE_CHECKING:
    from silotune.models.base import LoadedModel, TaskModel

Batch = Mapping[str, Tensor]
Rows = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of every example, ragged, and one integer of task-specific target each.

    Attributes
    ----------
    ids : int32 array [tokens]
        The token ids of all examples, one after the other.
    offsets : int64 array [n + 1]
        Example ``i`` is ``ids[offsets[i]:offsets[i + 1]]``.
    targets : int64 array [n]
        Classification: the label's index. Causal LM: the number of prompt tokens.
    pad_id : int
        Token that fills up a batch; its positions are masked, so any id will do.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    targets: NDArray[np.int64]
    pad_id: int

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], targets: Sequence[int], pad_id: int) -> Encoded:
        """From one list of token ids an example."""
        offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(s) for s in sequences], out=offsets[1:])
        ids = np.fromiter((t for s in sequences for t in s), dtype=np.int32, count=int(offsets[-1]))
        return cls(ids, offsets, np.asarray(targets, dtype=np.int64), pad_id)

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, shape [n]."""
        return np.diff(self.offsets)

    def tokens(self, row: int) -> NDArray[np.int32]:
        """Token ids of one example."""
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def subset(self, rows: Rows) -> Encoded:
        """The given examples, in the given order."""
        chosen = [self.tokens(int(row)) for row in rows]
        offsets = np.zeros(len(chosen) + 1, dtype=np.int64)
        np.cumsum([len(c) for c in chosen], out=offsets[1:])
        ids = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int32)
        return Encoded(ids, offsets, self.targets[np.asarray(rows, dtype=np.int64)], self.pad_id)

    def padded(self, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """A batch padded on the right, as long as its longest example.

        Returns
        -------
        dict
            ``input_ids`` and ``attention_mask``, int64 of shape [len(rows), longest].
        """
        chosen = self.subset(rows)
        lengths, width = chosen.lengths[:, None], int(chosen.lengths.max(initial=0))
        real = np.arange(width)[None, :] < lengths
        ids = np.full(real.shape, self.pad_id, dtype=np.int64)
        ids[real] = chosen.ids
        return {
            "input_ids": torch.from_numpy(ids).to(device),
            "attention_mask": torch.from_numpy(real.astype(np.int64)).to(device),
        }


class Task(Protocol):
    """A task; `silotune.models.tasks.get_task` gives one by its name in the plan."""

    @property
    def roles(self) -> frozenset[str]:
        """Roles of the columns that a dataset must have."""

    @property
    def has_head(self) -> bool:
        """Whether a classification head is trained beside the adapter."""

    def encode(
        self, examples: Sequence[Mapping[str, str]], tokenizer: Any, *, plan: Plan
    ) -> Encoded:
        """Token ids and targets of examples given as strings by role."""

    def collate(self, encoded: Encoded, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """A padded batch of the given rows, in the given order."""

    def losses(self, model: TaskModel, batch: Batch) -> Tensor:
        """One loss a sequence, float32 of shape [n], each a mean over its own tokens only."""

    def head_losses(
        self, model: TaskModel, features: Tensor, encoded: Encoded, rows: Rows
    ) -> Tensor:
        """The same losses, shape [n], from the features [n, hidden] of the given rows."""

    def head_score(
        self, model: TaskModel, features: Tensor, encoded: Encoded, rows: Rows
    ) -> NDArray[np.float64]:
        """The counts of `score` from the features [n, hidden] of the given rows."""

    def score(
        self, model: TaskModel, batch: Batch, *, cap: float = math.inf
    ) -> NDArray[np.float64]:
        """Counts that add up over batches and sites, from which `metrics` are computed.

        Where they are sums of losses, no text counts with more than `cap`; with a finite one they
        are finite, whatever the model gives.
        """

    def metrics(self, counts: NDArray[np.float64]) -> dict[str, float]:
        """Figures of merit from summed counts."""

    def predict(self, model: LoadedModel, texts: Sequence[str]) -> list[Any]:
        """What the model says of new texts."""
