"""Instruction tuning of a causal language model: prompt in, response out.

The loss is taken on the response and the end-of-sequence token only, and averaged within each
sequence first. A mean over a batch's tokens would let the length of one record change the gradient of
another, which no per-record guarantee survives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from silotune.errors import ModelError
from silotune.models import scores
from silotune.models.batching import batches
from silotune.models.card import PROMPT_END
from silotune.models.task import Batch, Encoded, Rows
from silotune.models.tokens import end_id, leading_ids, padding_id
from silotune.plan import Plan

if TYPE_CHECKING:
    from silotune.models.base import LoadedModel, TaskModel

_PREDICT_BATCH = 16


class CausalLm:
    """Mean negative log-likelihood of a response's tokens, given its prompt."""

    roles = frozenset({"prompt", "response"})
    has_head = False

    def encode(
        self, examples: Sequence[Mapping[str, str]], tokenizer: Any, *, plan: Plan
    ) -> Encoded:
        """Token ids of prompt, newline, response and end; targets are the prompts' lengths.

        Where an example is longer than ``data.max_length``, the response keeps its beginning and
        the prompt its end; one prompt token always remains.

        Raises
        ------
        ModelError
            The tokenizer has no end-of-sequence token.
        """
        end, limit = end_id(tokenizer), plan.data.max_length
        prompts = self._prompts([example["prompt"] for example in examples], tokenizer)
        responses = _token_ids(tokenizer, [example["response"] for example in examples])
        lead = len(leading_ids(tokenizer))
        sequences, targets = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            answer = [*response, end][: limit - 1]
            kept = _keep_end(prompt, limit - len(answer), lead=lead)
            sequences.append(kept + answer)
            targets.append(len(kept))
        return Encoded.of(sequences, targets, padding_id(tokenizer))

    def _prompts(self, prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
        lead = leading_ids(tokenizer)
        ids = _token_ids(tokenizer, [prompt + PROMPT_END for prompt in prompts])
        return [lead + row or [end_id(tokenizer)] for row in ids]

    def collate(self, encoded: Encoded, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """A right-padded batch.

        Returns
        -------
        dict
            ``input_ids``, ``attention_mask`` [n, longest]; ``kept`` [k], the consecutive positions
            whose logits any row needs; ``labels`` [n, k], the token that follows each of them, -100
            where it is none of a response.
        """
        batch = encoded.padded(rows, device)
        prompts = torch.from_numpy(encoded.targets[np.asarray(rows, dtype=np.int64)]).to(device)
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        positions = torch.arange(ids.shape[1], device=device)
        answered = real & (positions >= prompts[:, None])
        first = int(prompts.min()) - 1
        labels = ids.masked_fill(~answered, -100)[:, first + 1 :]
        return batch | {"kept": positions[first:-1], "labels": labels}

    def losses(self, model: TaskModel, batch: Batch) -> Tensor:
        """Mean loss of each response's tokens, float32 of shape [n]."""
        logits, labels = model(batch).float(), batch["labels"]
        each = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return each.sum(1) / (labels != -100).sum(1)

    def head_losses(
        self, model: TaskModel, features: Tensor, encoded: Encoded, rows: Rows
    ) -> Tensor:
        """A causal language model has no head of its own. Raises `ModelError`."""
        raise ModelError("causal_lm has no head that could be trained alone")

    def head_score(
        self, model: TaskModel, features: Tensor, encoded: Encoded, rows: Rows
    ) -> NDArray[np.float64]:
        """A causal language model has no head of its own. Raises `ModelError`."""
        raise ModelError("causal_lm has no head that could be scored alone")

    def score(self, model: TaskModel, batch: Batch) -> NDArray[np.float64]:
        """Sum of the sequences' losses, and their number: shape [2]."""
        with model.inference():
            losses = self.losses(model, batch)
        return np.array([float(losses.double().sum()), float(len(losses))])

    def metrics(self, counts: NDArray[np.float64]) -> dict[str, float]:
        """Mean loss a sequence, and its exponential (`scores.of_losses`)."""
        return scores.of_losses(counts)

    def predict(self, model: LoadedModel, texts: Sequence[str]) -> list[str]:
        """Greedy responses to prompts, in the order given.

        A prompt longer than half of ``data.max_length`` keeps its end; prompt and response together
        take at most ``data.max_length`` tokens.
        """
        limit, pad = model.plan.data.max_length, padding_id(model.tokenizer)
        lead = len(leading_ids(model.tokenizer))
        prompts = self._prompts(texts, model.tokenizer)
        prompts = [_keep_end(prompt, limit // 2, lead=lead) for prompt in prompts]
        encoded = Encoded.of(prompts, [0] * len(prompts), pad)
        found: dict[int, str] = {}
        for rows in batches(encoded, range(len(texts)), size=_PREDICT_BATCH):
            # Generation goes on from the last column, so prompts must end there.
            batch = encoded.padded(rows, model.device, side="left")
            found |= zip(rows, _generate(model, batch, limit=limit), strict=True)
        return [found[row] for row in range(len(texts))]


def _generate(model: LoadedModel, batch: Batch, *, limit: int) -> list[str]:
    width = batch["input_ids"].shape[1]
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=limit - width,
        pad_token_id=padding_id(model.tokenizer),
        eos_token_id=end_id(model.tokenizer),
    )
    with model.module.inference():
        made = model.module.peft.generate(**batch, generation_config=config)
    texts: list[str] = model.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
    return texts


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids without special tokens; the tokenizer's warning about long texts is not wanted."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return ids


def _keep_end(prompt: list[int], room: int, *, lead: int) -> list[int]:
    """At most `room` tokens: the `lead` first ones, as far as they fit, and the last ones."""
    if len(prompt) <= room:
        return prompt
    start = min(lead, room)
    return prompt[:start] + prompt[len(prompt) - (room - start) :]
