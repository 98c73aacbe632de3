"""A head on the pooled features of two texts that the model reads together.

The two become the base model's own pair, as its tokenizer makes it: with its special tokens, and with
token types where the model has them. Where a tokenizer puts nothing between two texts, an end of line
stands there. Where both are too long together, the longer one is cut, token by token, until they fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from silotune.models.answers import Targets
from silotune.models.batching import Encoded, padding_id, pair_ids
from silotune.models.tasks.text_classification import TextClassification
from silotune.plan.plan import Plan


@dataclass(frozen=True)
class PairClassification(TextClassification):
    """A linear head on the features of two texts."""

    def example(self, text: str, *, number: int, plan: Plan) -> dict[str, str]:
        """A text beside its own second half, with a target of the plan."""
        words = text.split(" ")
        return {
            **super().example(text, number=number, plan=plan),
            "text_b": " ".join(words[len(words) // 2 :]),
        }

    def inputs(
        self, examples: Sequence[Mapping[str, str]], targets: Targets, tokenizer: Any, plan: Plan
    ) -> Encoded:
        """Token ids and types of the pairs, cut at ``data.max_length``."""
        pairs = [(example["text"], example["text_b"]) for example in examples]
        ids, types = pair_ids(tokenizer, pairs, limit=plan.data.max_length)
        return Encoded.of(ids, targets, padding_id(tokenizer), types=types)
