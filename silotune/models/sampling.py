"""How an answer is drawn: the likeliest token always, or by chance, alike whatever stands beside it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from silotune.models.task import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What decides the next token of an answer.

    Attributes
    ----------
    temperature : float
        0 takes the likeliest; above, the probabilities are those of logits divided by it.
    top_p : float
        Of these, the smallest set of tokens that has so much probability.
    max_new_tokens : int or None
        Length of an answer; None for what ``data.max_length`` leaves.
    seed : int or None
        With one, a prompt has the same answer every time, in whatever order and company.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    seed: int | None = None

    def processors(self, prompts: Sequence[Sequence[int]]) -> list[LogitsProcessor]:
        """What makes a draw of the likeliest token; nothing at temperature 0."""
        if self.temperature == 0:
            return []
        found: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return [*found, _Draw([_generator(seed, prompt) for prompt in prompts])]


GREEDY = Sampling()


def drawing(model: LoadedModel, sampling: Sampling) -> LoadedModel:
    """A language model whose answers are drawn like this."""
    task: Any = model.task
    return (
        model
        if task.sampling == sampling
        else replace(model, task=replace(task, sampling=sampling))
    )


def _generator(seed: int, prompt: Sequence[int]) -> torch.Generator:
    digest = hashlib.sha256(repr((seed, list(prompt))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Gumbel noise: the largest logit then is a draw from their softmax (Gumbel, 1954).

    Every row has a generator of its own, so that no answer depends on its neighbours.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """Logits [n, vocabulary] with noise."""
        rows = [
            torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self._generators
        ]
        noise = -torch.log(-torch.log(torch.stack(rows)))
        return scores + noise.to(scores.device, scores.dtype)
