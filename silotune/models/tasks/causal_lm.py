"""Instruction tuning of a causal language model: prompt in, response out.

The loss is taken on the response and the end-of-sequence token only, and averaged within each
sequence first. A mean over a batch's tokens would let the length of one record change the gradient of
another, which no per-record guarantee survives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from silotune.errors import ModelError
from silotune.models.batching import (
    Batch,
    Encoded,
    Rows,
    bare_ids,
    end_id,
    end_ids,
    keep_end,
    leading_ids,
    padding_id,
    prompt_ids,
)
from silotune.models.prediction import Prediction
from silotune.models.sampling import GREEDY, Sampling
from silotune.models.task import LoadedModel, TaskModel
from silotune.plan.plan import Plan

_PREDICT_BATCH = 16
RESPONSE = "It was quiet."  # to every public prompt
_LOGITS = 1 << 24  # that a score makes at a time: 64 MB


@dataclass(frozen=True, kw_only=True)
class CausalLm:
    """Mean negative log-likelihood of a response's tokens, given its prompt.

    Attributes
    ----------
    sampling : Sampling
        How `predict` draws answers.
    """

    sampling: Sampling = GREEDY

    def example(self, text: str, *, number: int, plan: Plan) -> dict[str, str]:
        """A text as a prompt, and one short response to all."""
        return {"prompt": text, "response": RESPONSE}

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
        prompts = prompt_ids(tokenizer, [example["prompt"] for example in examples])
        responses = bare_ids(tokenizer, [example["response"] for example in examples])
        lead = len(leading_ids(tokenizer))
        sequences, targets = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            answer = [*response, end][: limit - 1]
            kept = keep_end(prompt, limit - len(answer), lead=lead)
            sequences.append(kept + answer)
            targets.append(len(kept))
        return Encoded.of(sequences, targets, padding_id(tokenizer))

    def collate(self, encoded: Encoded, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """A right-padded batch.

        Returns
        -------
        dict
            ``input_ids``, ``attention_mask`` [n, longest]; ``kept`` [k], the positions whose logits
            any row needs; ``labels`` [n, k], the token that follows each of them, -100
            where it is none of a response.
        """
        batch = encoded.padded(rows, device)
        prompts = torch.from_numpy(encoded.targets[np.asarray(rows, dtype=np.int64)]).to(device)
        real = batch["attention_mask"].bool()
        positions = torch.arange(real.shape[1], device=device)
        return labelled(batch, real & (positions >= prompts[:, None]))

    def losses(self, model: TaskModel, batch: Batch) -> Tensor:
        """Mean loss of each response's tokens, float32 of shape [n]."""
        labels = batch["labels"]
        return model.token_losses(batch, labels).sum(1) / (labels != -100).sum(1)

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

    def score(
        self, model: TaskModel, batch: Batch, *, cap: float = math.inf
    ) -> NDArray[np.float64]:
        """Sum of the sequences' losses, none of which counts more than `cap`, and their number.

        Logits are made of a few texts at a time: with a large vocabulary they are what fills memory.
        """
        size = max(1, _LOGITS // (len(batch["kept"]) * model.vocabulary))
        total = 0.0
        with model.inference():
            for start in range(0, len(batch["input_ids"]), size):
                part = {n: v if n == "kept" else v[start : start + size] for n, v in batch.items()}
                losses = self.losses(model, part).double()
                if cap < math.inf:
                    losses = losses.nan_to_num(nan=cap).clamp(0.0, cap)
                total += float(losses.sum())
        return np.array([total, len(batch["input_ids"])])

    def predict(
        self, model: LoadedModel, examples: Sequence[Mapping[str, str]]
    ) -> list[Prediction]:
        """Responses to prompts, in the order given, whatever the base model's own settings.

        A prompt longer than half of ``data.max_length`` loses its beginning; prompt and response
        together take at most ``data.max_length`` tokens, if `sampling` says nothing else. Prompts of
        one length are answered together, so that none is padded and no answer depends on its neighbours.
        """
        prompts, stops = self.prompts(model, examples), self.stops(model)
        alike: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            alike.setdefault(len(prompt), []).append(row)
        found: dict[int, str] = {}
        for rows in alike.values():
            for start in range(0, len(rows), _PREDICT_BATCH):
                some = rows[start : start + _PREDICT_BATCH]
                asked = [prompts[row] for row in some]
                found |= zip(some, self._answers(model, asked, stops), strict=True)
        return [Prediction(output=found[row]) for row in range(len(prompts))]

    def prompts(self, model: LoadedModel, examples: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """Token ids of what the model is to go on with."""
        lead, room = len(leading_ids(model.tokenizer)), model.plan.data.max_length // 2
        given = prompt_ids(model.tokenizer, [example["prompt"] for example in examples])
        return [keep_end(prompt, room, lead=lead) for prompt in given]

    def stops(self, model: LoadedModel) -> list[int]:
        """The tokens that end an answer."""
        return end_ids(model.tokenizer, model.module.backbone)

    def _answers(
        self, model: LoadedModel, prompts: Sequence[Sequence[int]], stops: list[int]
    ) -> list[str]:
        """What follows prompts of one length, until a response ends."""
        base, width = model.module.backbone, len(prompts[0])
        config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=self.sampling.max_new_tokens or model.plan.data.max_length - width,
            pad_token_id=padding_id(model.tokenizer),
            eos_token_id=stops,
        )
        ids = torch.tensor(prompts, device=model.device)
        # Transformers fills up what is not set here from the base model's own generation_config.json.
        own, base.generation_config = base.generation_config, GenerationConfig()
        try:
            with model.module.inference():
                made = model.module.peft.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    logits_processor=LogitsProcessorList(self.sampling.processors(prompts)),
                )
        finally:
            base.generation_config = own
        texts: list[str] = model.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        return texts


def labelled(batch: dict[str, Tensor], answered: Tensor) -> dict[str, Tensor]:
    """A batch with ``labels`` where ``answered`` [n, longest], and the positions ``kept`` for them."""
    labels = batch["input_ids"].masked_fill(~answered, -100)[:, 1:]
    kept = (labels != -100).any(0).nonzero().squeeze(1)
    return batch | {"kept": kept, "labels": labels[:, kept]}
