"""A base model with an adapter, and a head where the task has one, ready to be trained.

The backbone is a plain Hugging Face model inside a plain `PeftModel`; the head stands beside it. An
adapter saved from it therefore loads with Transformers and PEFT alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from silotune.errors import ModelError
from silotune.models.adapter import layout_of
from silotune.models.choices import Choices, choose, resolve_device
from silotune.models.features import FrozenPrefix
from silotune.models.layout import Group, Layout
from silotune.models.lora import saved_name, wrap
from silotune.models.pretrained import (
    fixed_rng,
    load_base,
    load_config,
    load_tokenizer,
    locate,
    quiet,
    require_length,
    require_text,
    require_weights,
)
from silotune.models.task import Batch, Encoded, Task
from silotune.models.tasks import get_task
from silotune.models.trial import require_fit
from silotune.plan.plan import Plan


class TaskModel(nn.Module):
    """Backbone, adapter and head as one module.

    Parameters
    ----------
    peft : PeftModel
        Around ``AutoModel``, or around ``AutoModelForCausalLM`` where there is no head.
    head : nn.Linear or None
        Classifies features; starts at zero.
    pooling : str
        How the tokens of a text become one vector: "mean", "first" or "last" token.
    feature_scale : float
        Factor of the features.
    """

    centre: Tensor

    def __init__(
        self,
        peft: Any,
        head: nn.Linear | None,
        *,
        pooling: str,
        feature_scale: float,
    ) -> None:
        super().__init__()
        self.peft, self.head = peft, head
        self.pooling, self.feature_scale = pooling, feature_scale
        hidden = 0 if head is None else head.in_features
        self.register_buffer("centre", torch.zeros(hidden))
        if head is not None:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.prefix = FrozenPrefix.of(peft)
        forward = inspect.signature(peft.get_base_model().forward)
        self._keeps = "logits_to_keep" in forward.parameters

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
        """Pooled token vectors of unit length.

        Parameters
        ----------
        batch : mapping
            ``input_ids`` and ``attention_mask`` [n, tokens], padded on the right, and perhaps
            ``prefix`` [n, tokens, hidden], see `silotune.models.features`.

        Returns
        -------
        Tensor
            Float32 of shape [n, hidden].
        """
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with self.prefix.replay(batch.get("prefix")) if self.prefix else nullcontext():
            hidden = self.peft(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return normalize(_pool(hidden, mask, self.pooling), dim=-1)

    def features(self, batch: Batch) -> Tensor:
        """What the head sees: embeddings minus the centre, times the scale; [n, hidden].

        Unit length bounds the gradient of the head; the centre takes out what all texts share.
        """
        return (self.embed(batch) - self.centre) * self.feature_scale

    def forward(self, batch: Batch) -> Tensor:
        """Logits.

        Returns
        -------
        Tensor
            With a head [n, labels]; without [n, k, vocabulary] at the positions ``batch["kept"]``.
        """
        if self.head is not None:
            return self.head(self.features(batch))  # type: ignore[no-any-return]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        kept = batch["kept"]
        if self._keeps:  # logits of a large vocabulary are most of a step's memory
            logits: Tensor = self.peft(**inputs, use_cache=False, logits_to_keep=kept).logits
            return logits
        every: Tensor = self.peft(**inputs, use_cache=False).logits
        return every[:, kept]

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


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model on a device, with all that goes with it.

    Attributes
    ----------
    module : TaskModel
        Float32, in training mode.
    tokenizer : PreTrainedTokenizerBase
        Of the base model.
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


def load_model(
    plan: Plan,
    *,
    base: str | None = None,
    device: str = "auto",
    attention: str | None = None,
    dtype: str | None = None,
    rank: int | None = None,
    trial: bool = True,
) -> LoadedModel:
    """Load the plan's base model and put a fresh adapter on it.

    The adapter depends on the plan alone (see `silotune.models.lora.initial_matrix`), and the state
    of global random generators neither matters nor changes.

    Parameters
    ----------
    plan : Plan
        What to load.
    base : str, optional
        Where the base model is on this machine, if not where ``model.base`` says.
    device : str
        As for `silotune.models.choices.choose`.
    attention, dtype : str, optional
        What `choose` said, so that all processes of a run compute alike. What is left out is
        chosen here by `choose`'s fixed rule.
    rank : int, optional
        Of this site's adapter, if smaller than the plan's; its scale is the plan's all the same.
    trial : bool
        Try it on public texts (`silotune.models.trial.require_fit`). What was trained already need
        not be tried to be used.

    Raises
    ------
    ModelError
        Of some kind: the model is not there, does not fit the plan, or did not stand the trial.
    EnvironmentFault
        The device is not there.
    """
    folder = locate(base or plan.model.base)
    require_weights(folder, plan.model.sha256)
    choices = _complete(plan, base=base, device=device, attention=attention, dtype=dtype)
    model = _assembled(plan, folder, choices, rank=rank)
    if trial:
        require_fit(model, folder)
    return model


def _assembled(plan: Plan, folder: Path, choices: Choices, *, rank: int | None) -> LoadedModel:
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    task, place = get_task(plan.model.task), torch.device(choices.device)
    with fixed_rng(), quiet():
        bare = load_base(folder, config, plan=plan, attention=choices.attention)
        require_text(bare, tokenizer)
        require_length(bare, tokenizer, plan)
        size = sum(parameter.numel() for parameter in bare.parameters())
        module = with_adapter(bare, plan, rank=rank)
    module.to(place).train()
    _centre(module, tokenizer, task, plan, place)
    layout = layout_of(module)
    return LoadedModel(
        module=module,
        tokenizer=tokenizer,
        task=task,
        layout=layout,
        device=place,
        dtype=getattr(torch, choices.dtype),
        attention=choices.attention,
        description=f"{_shown(folder, plan)} ({config.model_type}), {size / 1e6:.1f} M parameters, "
        f"{layout.size:,} trained; {choices}",
        plan=plan,
    )


def with_adapter(bare: PreTrainedModel, plan: Plan, *, rank: int | None = None) -> TaskModel:
    """A base model with the plan's adapter, and head where the task has one.

    Raises
    ------
    TargetModulesUnknown, ModelError
        The adapter does not fit the model.
    """
    head = None
    if get_task(plan.model.task).has_head:
        hidden = getattr(bare.config.get_text_config(), "hidden_size", None)
        if hidden is None:
            raise ModelError(f"a {bare.config.model_type} model has no one width of hidden states")
        head = nn.Linear(int(hidden), len(plan.model.labels))
    return TaskModel(
        wrap(bare, plan, rank=rank),
        head,
        pooling=plan.model.pooling,
        feature_scale=plan.model.feature_scale,
    )


def _complete(
    plan: Plan, *, base: str | None, device: str, attention: str | None, dtype: str | None
) -> Choices:
    if attention is None or dtype is None:
        found = choose(plan, device=device, base=base, measure=False)
        if attention is None and dtype is None:
            return found
        attention, dtype = attention or found.attention, dtype or found.dtype
    return Choices(device=str(resolve_device(device)), dtype=dtype, attention=attention)


def _pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """[n, tokens, hidden] to [n, hidden], for texts padded on the right."""
    if pooling == "first":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def _centre(module: TaskModel, tokenizer: Any, task: Task, plan: Plan, place: torch.device) -> None:
    """Set the centre: the mean embedding of public texts, by the base model as it came."""
    texts, labels = plan.model.centre_texts, plan.model.labels
    if module.head is None or not texts:
        return
    examples: list[Mapping[str, str]] = [{"text": text, "label": labels[0]} for text in texts]
    encoded: Encoded = task.encode(examples, tokenizer, plan=plan)
    with module.inference():
        batch = encoded.padded(range(len(texts)), place)
        module.centre.copy_(module.embed(batch).mean(0))


def _shown(folder: Path, plan: Plan) -> str:
    """Name of a model for people: its hub id, or the last two parts of its folder."""
    named = Path(plan.model.base).expanduser()
    return "/".join(folder.resolve().parts[-2:]) if named.is_dir() else plan.model.base
