"""A task, and the model that is trained for it: what the two ask of each other.

A task turns records into tokens, tokens into losses and predictions into counts, and holds no state. A
new one is one file in ``silotune/models/tasks`` and a line in its registry.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.modules.batchnorm import _BatchNorm

from silotune.models.batching import Batch, Encoded, Rows
from silotune.models.cosines import Cosines
from silotune.models.layout import Group, Layout, saved_name
from silotune.models.next_tokens import next_token_losses, passed_through, plain_output
from silotune.models.prediction import Prediction
from silotune.plan.plan import Plan

_LAYER = re.compile(r"^(.*)\.(\d+)\.")


class Task(Protocol):
    """A task; `silotune.models.tasks.get_task` gives the one of a plan."""

    def example(self, text: str, *, number: int, plan: Plan) -> Mapping[str, str]:
        """A public example that the model is tried with: by role, targets taking turns by `number`."""

    def encode(
        self, examples: Sequence[Mapping[str, str]], tokenizer: Any, *, plan: Plan
    ) -> Encoded:
        """Token ids and targets of examples given as strings by role."""

    def collate(self, encoded: Encoded, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """A padded batch of the given rows, in the given order."""

    def losses(self, model: TaskModel, batch: Batch) -> Tensor:
        """One loss a record, float32 of shape [n], each a mean over its own tokens only."""

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
        """Counts that add up over batches and sites; `silotune.models.scores` makes metrics of them.

        Where they are sums of losses, no text counts with more than `cap`; with a finite one they
        are finite, whatever the model gives.
        """

    def predict(
        self, model: LoadedModel, examples: Sequence[Mapping[str, str]]
    ) -> list[Prediction]:
        """What the model says of new examples, in their order; they have no target role."""


class FrozenPrefix:
    """The layers of a model below its first trained one.

    Parameters
    ----------
    layers : list of nn.Module
        At least one, each a function of the hidden states before it.
    first : nn.Module
        The first layer that is trained.
    """

    def __init__(self, layers: list[nn.Module], first: nn.Module) -> None:
        self._first = first
        self._given: Tensor | None = None
        self._layers = layers
        for number, layer in enumerate(layers):
            self._replace(layer, entry=number == 0)

    @classmethod
    def of(cls, model: nn.Module) -> FrozenPrefix | None:
        """The frozen prefix of a model with its adapter in place; None if it has none."""
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        matches = [_LAYER.match(name) for name in trained]
        stacks = {match[1] for match in matches if match}
        if not trained or not all(matches) or len(stacks) != 1:
            return None
        stack = model.get_submodule(stacks.pop())
        lowest = min(int(match[2]) for match in matches if match)
        if not isinstance(stack, nn.ModuleList) or lowest == 0:
            return None
        return cls([stack[number] for number in range(lowest)], stack[lowest])

    def _replace(self, layer: nn.Module, *, entry: bool) -> None:
        plain = layer.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._given is None:
                return plain(hidden_states, *args, **kwargs)
            return self._given if entry else hidden_states

        layer.forward = forward

    def remove(self) -> None:
        """Give every layer its own forward back."""
        for layer in self._layers:
            del layer.forward

    @contextmanager
    def replay(self, hidden: Tensor | None) -> Iterator[None]:
        """Have the lower layers give `hidden` [n, tokens, size] for the time being, if not None."""
        self._given = hidden
        try:
            yield
        finally:
            self._given = None

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Collect what the first trained layer is given, one tensor a forward pass."""
        seen: list[Tensor] = []

        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del layer
            seen.append((args[0] if args else kwargs["hidden_states"]).detach())

        handle = self._first.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()


class TaskModel(nn.Module):
    """Backbone, adapter and head as one module.

    Parameters
    ----------
    peft : PeftModel or PreTrainedModel
        Around ``AutoModel``, or around ``AutoModelForCausalLM`` where there is no head; the base model
        itself where only a head is trained.
    head : nn.Linear or None
        Classifies features; starts at zero.
    pooling : str
        How the tokens of a text become one vector: "mean", "first" or "last" token; or "each", where
        the head sees every token's own.
    feature_scale : float
        Factor of the features.
    cosines : Cosines, optional
        Stands between the features and the head.
    """

    centre: Tensor

    def __init__(
        self,
        peft: Any,
        head: nn.Linear | None,
        *,
        pooling: str,
        feature_scale: float,
        cosines: Cosines | None = None,
    ) -> None:
        super().__init__()
        self.peft, self.head, self.cosines = peft, head, cosines
        self.pooling, self.feature_scale = pooling, feature_scale
        inputs = 0 if head is None else head.in_features
        hidden = inputs if cosines is None else cosines.frequencies.shape[1]
        self.register_buffer("centre", torch.zeros(hidden))
        if head is not None:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        bare = self.backbone
        self.sees = bare.main_input_name == "pixel_values"
        self.prefix = None if self.sees else FrozenPrefix.of(peft)
        forward = inspect.signature(bare.forward).parameters
        self._keeps = "logits_to_keep" in forward
        types = getattr(bare.config, "type_vocab_size", 0) or 0
        self.tells_types = "token_type_ids" in forward and types > 1
        self._norms = [layer for layer in bare.modules() if isinstance(layer, _BatchNorm)]

    @property
    def backbone(self) -> Any:
        """The base model, whether it has an adapter or not."""
        return self.peft.get_base_model() if isinstance(self.peft, PeftModel) else self.peft

    @cached_property
    def vocabulary(self) -> int:
        """How many tokens a language model has logits of."""
        return int(self.backbone.config.get_text_config().vocab_size)

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for batch normalisation: it stays with the statistics that it came with.

        Those of a batch would make a record's gradient depend on the others.
        """
        super().train(mode)
        for layer in self._norms:
            layer.eval()
        return self

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their layout names, in the order of the layout."""
        found = {
            saved_name(name): parameter
            for name, parameter in self.peft.named_parameters()
            if parameter.requires_grad
        }
        if self.head is not None:
            found |= {f"head.{name}": p for name, p in self.head.named_parameters()}
        return found

    def embed(self, batch: Batch) -> Tensor:
        """Pooled vectors of unit length, of tokens or of parts of an image; or each token's.

        Parameters
        ----------
        batch : mapping
            ``input_ids`` and ``attention_mask`` [n, tokens], padded on the right, and perhaps
            ``prefix`` [n, tokens, hidden], see `silotune.models.features`, and ``token_type_ids``
            [n, tokens], for models that tell the two texts of a pair by them; or ``pixel_values``.

        Returns
        -------
        Tensor
            Float32 of shape [n, hidden], or [n, tokens, hidden].
        """
        if self.sees:
            return normalize(self._seen(batch["pixel_values"]).float(), dim=-1)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        more = {}
        if self.tells_types and "token_type_ids" in batch:
            more["token_type_ids"] = batch["token_type_ids"]
        with self._replayed(batch):
            hidden = self.peft(input_ids=ids, attention_mask=mask, **more).last_hidden_state.float()
        return normalize(_pool(hidden, mask, self.pooling), dim=-1)

    def _seen(self, pixels: Tensor) -> Tensor:
        """One vector an image: of its tokens, or of a convolutional net what that itself pools."""
        found = self.peft(pixel_values=pixels)
        hidden: Tensor = found.last_hidden_state
        if hidden.dim() == 4:
            pooled: Tensor = found.pooler_output
            return pooled.flatten(1)
        return hidden[:, 0] if self.pooling == "first" else hidden.mean(1)

    def features(self, batch: Batch) -> Tensor:
        """Embeddings minus the centre, times the scale, of their shape: what `logits` is asked of.

        Unit length bounds the gradient of the head; the centre takes out what all texts share.
        """
        return (self.embed(batch) - self.centre) * self.feature_scale

    def logits(self, features: Tensor) -> Tensor:
        """What the head says of features [..., hidden]: [..., its width]."""
        assert self.head is not None
        seen = features if self.cosines is None else self.cosines(features)
        return self.head(seen)  # type: ignore[no-any-return]

    def forward(self, batch: Batch) -> Tensor:
        """Logits.

        Returns
        -------
        Tensor
            With a head its width for each text, or for each token; without [n, k, vocabulary] at the
            positions ``batch["kept"]``.
        """
        if self.head is not None:
            return self.logits(self.features(batch))
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        kept = batch["kept"]
        with self._replayed(batch):
            if self._keeps:  # logits of a large vocabulary are most of a step's memory
                logits: Tensor = self.peft(**inputs, use_cache=False, logits_to_keep=kept).logits
                return logits
            every: Tensor = self.peft(**inputs, use_cache=False).logits
            return every[:, kept]

    def _replayed(self, batch: Batch) -> AbstractContextManager[None]:
        """With what the batch has of the frozen layers in their place."""
        return nullcontext() if self.prefix is None else self.prefix.replay(batch.get("prefix"))

    def token_losses(self, batch: Batch, labels: Tensor) -> Tensor:
        """Negative log-likelihood of labels [n, k] at ``batch["kept"]``; 0 where one is -100."""
        counted = labels != -100
        output = self.output
        if output is None:
            losses = cross_entropy(self(batch)[counted].float(), labels[counted], reduction="none")
        else:
            with passed_through(output):
                states = self(batch)[counted]
            losses = next_token_losses(states, labels[counted], output, vocabulary=self.vocabulary)
        return losses.new_zeros(labels.shape).masked_scatter(counted, losses)

    @cached_property
    def output(self) -> nn.Module | None:
        """The output layer, if its input is all that the losses need of the rest."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.centre.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with self.inference():
            return plain_output(self.backbone, lambda: self.peft(**inputs, use_cache=False).logits)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Without gradients and LoRA dropout; training mode is as before afterwards."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)


def _pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """[n, tokens, hidden] to [n, hidden], for texts padded on the right; as it is for "each"."""
    if pooling == "each":
        return hidden
    if pooling == "first":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model on a device, with all that goes with it.

    Attributes
    ----------
    module : TaskModel
        Float32, in training mode.
    tokenizer : PreTrainedTokenizerBase or Preparation
        Of the base model; of a model of images, what they go through.
    task : Task
        What it is trained for.
    layout : Layout
        The trained parameters as one flat vector.
    device : torch.device
        Where the module is.
    dtype : torch.dtype
        For matrix products with frozen weights; the weights themselves are float32.
    attention : str
        Transformers' name of the implementation in use.
    description : str
        All this in one line, for people.
    plan : Plan
        What it was loaded for.
    """

    module: TaskModel
    tokenizer: Any
    task: Task
    layout: Layout
    device: torch.device
    dtype: torch.dtype
    attention: str
    description: str
    plan: Plan

    def parameters(self, group: Group | None = None) -> tuple[nn.Parameter, ...]:
        """The trained parameters, of one group or all, in the order of the layout."""
        trained = self.module.trained
        return tuple(
            trained[entry.name]
            for entry in self.layout.entries
            if entry.name in trained and group in {None, entry.group}
        )
