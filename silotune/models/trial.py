"""What a loaded model does with a few public texts, before it is trusted with records.

Everything that privacy rests on is a property of the model that can be tried: it runs and has
gradients, a record's loss and gradient are its own whatever stands beside it in a batch, and a causal
language model does not see the token it is to predict. The texts are fixed and public, so the
verdict is the same at every site and tells nothing of any record. It names the layer in which a
computation failed, or two of them parted.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from silotune.errors import (
    LayerUnsupported,
    LengthRefused,
    ModelError,
    RecordsMixed,
    SelfCheckFailed,
    SilotuneError,
    TextRefused,
    TokensSeenEarly,
)
from silotune.models.batching import Encoded, record_of
from silotune.models.features import compute_frozen
from silotune.models.pretrained import fixed_rng, quiet, told
from silotune.models.task import LoadedModel
from silotune.privacy.clipping import Attached, attach


def running_layer(module: nn.Module, run: Callable[[], object]) -> str:
    """Name of the innermost layer that `run` was in when it failed; empty if in none."""
    entered: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *args: entered.append(name)

    def leave(*args: Any) -> None:
        entered.pop()

    handles = []
    for name, layer in module.named_modules():
        if name:
            handles += [
                layer.register_forward_pre_hook(enter(name)),
                layer.register_forward_hook(leave),
            ]
    try:
        with suppress(Exception):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return shown(entered[-1]) if entered else ""


def first_difference(
    module: nn.Module,
    one: Callable[[], object],
    other: Callable[[], object],
    *,
    views: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    tolerance: float,
) -> str:
    """Name of the first layer whose outputs differ between two computations; empty if none does.

    Parameters
    ----------
    module : nn.Module
    one, other : callable
        Run the module once.
    views : pair of callables
        The parts of an output [n, ...] of each that ought to agree.
    tolerance : float
        Largest difference in parts of the largest number.
    """
    found = []
    for run, view in zip((one, other), views, strict=True):
        with _outputs(module, view) as seen:
            run()
        found.append(seen)
    for (name, a), (again, b) in zip(*found, strict=False):
        if name != again:
            break
        if a.shape == b.shape and differs(a, b, tolerance=tolerance):
            return shown(name)
    return ""


def differs(a: Tensor, b: Tensor, *, tolerance: float) -> bool:
    """Whether the largest difference is above a part of the largest number."""
    if not a.numel():
        return False
    return not bool((a - b).abs().max() <= tolerance * a.abs().max())


@contextmanager
def _outputs(
    module: nn.Module, view: Callable[[Tensor], Tensor]
) -> Iterator[list[tuple[str, Tensor]]]:
    """Collect a part of every layer's output, in the order in which they finish."""
    seen: list[tuple[str, Tensor]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.is_floating_point():
                with suppress(IndexError, RuntimeError):  # its first dimension is not the batch
                    seen.append((name, view(first.detach()).clone()))

        return hook

    handles = [m.register_forward_hook(look(name)) for name, m in module.named_modules() if name]
    try:
        with torch.no_grad():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def plain(name: str) -> str:
    """A name without what PEFT puts before it, which the plan's reader never sees."""
    for lead in ("peft.base_model.model.", "peft.base_model.", "base_model.model."):
        name = name.removeprefix(lead)
    return name


def shown(name: str) -> str:
    """A layer's name, whichever of PEFT's parts of it was meant."""
    return plain(name).replace(".base_layer", "").split(".lora_", 1)[0]


# Relative; rounding is some 1e-6, rows that depend on each other differ by 1e-3 and more.
_AGREE = 1e-4
# More tokens are not tried: a model would have to change its ways beyond them.
_LONGEST = 1024
_ENDS = 8  # tokens by which the two long texts differ
SENTENCES = (
    "The river was low that summer.",
    "Rain.",
    "Two boats crossed at noon, and the bells were heard on both banks.",
    "Nobody counted the birds.",
)
# Sizes and orders in which the texts must come out as they do alone.
_BATCHES = ([0, 1, 2, 3], [3, 1], [2, 0, 3])
_SPREAD = 0.05  # of trained numbers while trying: an adapter or head at zero hides everything


@dataclass(frozen=True)
class Refusal:
    """An error to be raised again: the error itself would keep the model in memory."""

    kind: type[SilotuneError]
    detail: str
    remedy: str

    @classmethod
    def of(cls, error: SilotuneError) -> Refusal:
        """What an error says."""
        return cls(type(error), error.detail, error.remedy)

    def error(self) -> SilotuneError:
        """The error anew."""
        return self.kind(self.detail, remedy=self.remedy)


@dataclass(frozen=True)
class TrialResult:
    """What a trial found.

    Attributes
    ----------
    refusal : Refusal or None
        Why the model can't be used for the plan.
    prefix : bool
        Whether the frozen lower layers may be replaced by what they gave once.
    """

    refusal: Refusal | None
    prefix: bool = False


_KNOWN: dict[str, TrialResult] = {}


def require_fit(model: LoadedModel, folder: Path) -> None:
    """Try a model that was just loaded; once a process for each model and kind of plan.

    A frozen prefix that does not agree with the whole model is taken away from it.

    Parameters
    ----------
    model : LoadedModel
        Trained parameters, gradients and the state of random generators are as before afterwards.
    folder : Path
        Where its files are.

    Raises
    ------
    LengthRefused, TextRefused
        It fails on texts.
    LayerUnsupported
        Under privacy, a layer without exact gradients of single records.
    RecordsMixed
        Under privacy, what it makes of a record depends on the others in the batch.
    TokensSeenEarly
        A causal language model sees the tokens that it is to predict.
    """
    key = trial_key(model.plan, folder, rest=f"{model.attention} {model.device}")
    if key not in _KNOWN:
        _KNOWN[key] = _tried(model)
    verdict = _KNOWN[key]
    if verdict.refusal is not None:
        raise verdict.refusal.error()
    if model.module.prefix is not None and not verdict.prefix:
        model.module.prefix.remove()
        model.module.prefix = None


def trial_key(plan: Any, folder: Path, *, rest: str = "") -> str:
    """What a verdict depends on: the model's files, and what of the plan shapes the computation."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    lora = plan.lora.model_dump(exclude={"r", "alpha"})
    shape = (plan.data.max_length, plan.per_unit, plan.freezes_a)
    return repr((str(folder), stamps, plan.model, lora, shape, rest))


def _tried(model: LoadedModel) -> TrialResult:
    with _untouched(model), fixed_rng(), quiet():
        try:
            trial = _Trial(model)
            trial.require_running()
            if model.plan.task.generates:
                trial.require_causal()
            if model.plan.per_unit:
                trial.require_own_rows()
            return TrialResult(None, prefix=trial.prefix_agrees())
        except SilotuneError as exc:
            return TrialResult(Refusal.of(exc))
        except Exception as exc:
            return TrialResult(Refusal.of(TextRefused(f"trying it failed: {told(exc)}")))


@contextmanager
def _untouched(model: LoadedModel) -> Iterator[None]:
    """Spread the trained parameters for a while, without dropout of LoRA's; all is put back."""
    kept = [p.detach().clone() for p in model.parameters()]
    wanted = [p.requires_grad for p in model.parameters()]
    dropouts = [m for m in model.module.modules() if isinstance(m, nn.Dropout) and m.training]
    states = (random.getstate(), np.random.get_state())
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in model.parameters():
                spread = torch.randn(parameter.shape, generator=generator)
                parameter.add_(spread.to(parameter.device), alpha=_SPREAD)
        for layer in dropouts:
            layer.eval()
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for layer in dropouts:
            layer.train()
        with torch.no_grad():
            for parameter, values, trained in zip(model.parameters(), kept, wanted, strict=True):
                parameter.copy_(values)
                parameter.requires_grad_(trained)
                parameter.grad = None


def _texts(model: LoadedModel) -> Encoded:
    """The sentences, and two texts as long as the plan's longest, one some tokens shorter.

    Of a model of images as many drawn pictures, which are all of one size.
    """
    if model.plan.task.sees:
        few = [model.task.example("", number=n, plan=model.plan) for n in range(len(SENTENCES) + 2)]
        return model.task.encode(few, model.tokenizer, plan=model.plan)
    longest = min(model.plan.data.max_length, _LONGEST)
    plan = model.plan.override({"data.max_length": longest})
    words = " ".join(SENTENCES).split() * (longest // 20 + 2)

    def encoded(*texts: str) -> Encoded:
        examples = [model.task.example(t, number=n, plan=plan) for n, t in enumerate(texts)]
        return model.task.encode(examples, model.tokenizer, plan=plan)

    def length(number: int) -> int:
        return int(encoded(" ".join(words[:number])).lengths[0])

    most = max(length(1), length(len(words)) - _ENDS)
    shorter = max(1, bisect_right(range(len(words)), most, key=length) - 1)
    return encoded(*SENTENCES, " ".join(words), " ".join(words[:shorter]))


class _Trial:
    """A model, the texts, and what the model makes of batches of them."""

    def __init__(self, model: LoadedModel) -> None:
        self.model, self.encoded = model, _texts(model)
        self.long = [len(self.encoded) - 2, len(self.encoded) - 1]

    def inputs(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The task's batch."""
        return self.model.task.collate(self.encoded, list(rows), self.model.device)

    def losses(self, rows: Sequence[int]) -> Tensor:
        """Losses [len(rows)], with what autograd needs."""
        return self.model.task.losses(self.model.module, self.inputs(rows))

    def numbers(self, rows: Sequence[int]) -> Tensor:
        """Losses [len(rows)] without."""
        with torch.no_grad():
            return self.losses(rows)

    # --- it runs ---

    def require_running(self) -> None:
        """Forward of the longest texts, then forward and backward of ones of unequal length."""
        try:
            self._first = self.numbers(self.long)
        except Exception as exc:
            if not self._works(2):  # it is not for their length
                self._require(lambda: self.numbers(self.long))
            raise self._too_long(exc) from exc
        if self.model.plan.per_unit:  # its gradients are looked at closely below
            self._require(lambda: self.numbers(_BATCHES[0]))
        else:
            self._require(lambda: self.losses(_BATCHES[0]).sum().backward())  # type: ignore[no-untyped-call]

    def _require(self, run: Callable[[], object]) -> None:
        """Run, and turn what a library raises into an error that names the layer."""
        try:
            run()
        except SilotuneError:
            raise
        except Exception as exc:
            layer = running_layer(self.model.module, run)
            where = f"in layer {layer}" if layer else "outside of its layers, or in its gradients"
            raise TextRefused(f"it failed {where}: {told(exc)}") from exc

    def _too_long(self, exc: Exception) -> ModelError:
        """The error of texts that are too long, with the longest length that works."""
        works, fails = 2, int(self.encoded.lengths.max())
        while fails - works > 1:
            middle = (works + fails) // 2
            works, fails = (middle, fails) if self._works(middle) else (works, middle)
        return LengthRefused(
            f"data.max_length is {self.model.plan.data.max_length}, the model takes {works} tokens "
            f"and fails on more: {told(exc)}"
        )

    def _works(self, length: int) -> bool:
        """Whether the model takes the beginning of the long text."""
        encoded = self.encoded.beginning(self.long[0], length)
        if self.model.plan.task.generates:  # one token of a prompt
            encoded = replace(encoded, targets=np.ones_like(encoded.targets))
        try:
            with torch.no_grad():
                batch = self.model.task.collate(encoded, [0], self.model.device)
                self.model.task.losses(self.model.module, batch)
        except Exception:
            return False
        return True

    # --- a decoder is one ---

    def require_causal(self) -> None:
        """Another last token must not change what is predicted at the earlier ones."""
        row = int(self.encoded.lengths[: self.long[0]].argmax())
        batch = self.inputs([row])
        last = batch["input_ids"].shape[1] - 1
        batch["kept"] = torch.arange(last, device=self.model.device)
        ids = batch["input_ids"].clone()
        ids[0, last] = next(token for token in ids[0].tolist() if token != int(ids[0, last]))
        changed = batch | {"input_ids": ids}
        module = self.model.module
        with torch.no_grad():
            before, after = module(batch), module(changed)
        if not differs(before, after, tolerance=_AGREE):
            return
        views = (lambda out: out[0, :last], lambda out: out[0, :last])
        layer = first_difference(
            module, lambda: module(batch), lambda: module(changed), views=views, tolerance=_AGREE
        )
        raise TokensSeenEarly(f"layer {layer or 'unknown'} looks at later tokens")

    # --- a record is on its own ---

    def require_own_rows(self) -> None:
        """A record's loss and gradient are the same alone, in every batch, and when it comes again.

        The long texts came first and come last: BigBird attends otherwise after a short one.
        """
        with self._attached() as attached:
            alone = [self._one(attached, [row]) for row in range(self.long[0])]
            scale = max(float(gradients.norm()) for _, gradients in alone)
            for rows in _BATCHES:
                losses, gradients = self._one(attached, rows)
                self._require_same(rows, losses, [alone[row][0][0] for row in rows])
                for row, found in zip(rows, gradients, strict=True):
                    expected = alone[row][1][0]
                    least = max(float(expected.norm()), 1e-3 * scale)
                    if not (error := float((found - expected).norm()) / least) <= _AGREE:
                        raise RecordsMixed(
                            f"a text's gradient changed by {error:.2g} of itself with those beside it"
                        )
        shorter = self.long[1]
        self._require_same(self.long, self._first, [None, self.numbers([shorter])[0]])
        self._require_same(self.long, self.numbers(self.long), list(self._first))

    def _require_same(
        self, rows: Sequence[int], found: Tensor, expected: Sequence[Tensor | None]
    ) -> None:
        """Check losses against those of the same texts in other company, where known."""
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            if other is None:
                continue
            change = float(one.detach() - other.detach())
            if not abs(change) <= _AGREE * max(1.0, abs(float(other))):
                raise RecordsMixed(self._mixing(rows, place, change))

    def _mixing(self, rows: Sequence[int], place: int, change: float) -> str:
        length = int(self.encoded.lengths[rows[place]])
        layer = first_difference(
            self.model.module,
            lambda: self.numbers([rows[place]]),
            lambda: self.numbers(rows),
            views=(lambda out: out[0, :length], lambda out: out[place, :length]),
            tolerance=_AGREE,
        )
        where = f"; layer {layer} is the first that differs" if layer else ""
        return f"a text's loss changed by {change:.2g} with the texts beside it{where}"

    @contextmanager
    def _attached(self) -> Iterator[Attached]:
        try:
            attached = attach(self.model.module, private=True, dtype=torch.float32)
        except LayerUnsupported as exc:
            raise LayerUnsupported(plain(exc.detail)) from exc
        try:
            yield attached
        finally:
            attached.detach()

    def _one(self, attached: Attached, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Losses [len(rows)] and gradients [len(rows), parameters] of single texts, on the CPU."""
        try:
            return self._gradients(attached, rows)
        except SelfCheckFailed as exc:
            raise self._inexact(exc.detail) from exc
        except SilotuneError:
            raise
        except Exception as exc:
            raise self._inexact(told(exc)) from exc

    def _gradients(self, attached: Attached, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        attached.clear()
        inputs = self.inputs(rows)
        losses = self.model.task.losses(self.model.module, inputs)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        parameters, row_of = tuple(attached.parameters.values()), record_of(inputs, len(rows))
        attached.check_gradients(parameters, len(row_of))
        samples = [cast(Any, parameter).grad_sample.flatten(1).cpu() for parameter in parameters]
        attached.clear()
        found = torch.cat(samples, dim=1)
        return losses.detach(), found.new_zeros(len(rows), found.shape[1]).index_add(
            0, row_of.cpu(), found
        )

    def _inexact(self, why: str) -> LayerUnsupported:
        """The error of layers whose gradients are not one a record; says which would do."""
        named = self.model.module.trained
        leaves: dict[str, list[nn.Parameter]] = {}
        for name, parameter in named.items():
            if not name.startswith("head."):
                leaves.setdefault(shown(name).rsplit(".", 1)[-1], []).append(parameter)
        good = {leaf: self._exact(parameters) for leaf, parameters in leaves.items()}
        bad = sorted(leaf for leaf, exact in good.items() if not exact)
        rest = sorted(leaf for leaf, exact in good.items() if exact)
        use = f"Use lora.target_modules = {rest}, or train" if rest else "Train"
        return LayerUnsupported(
            f"no exact gradients of single records in {', '.join(bad) or 'the model'}: the layer does "
            f"not get one batch of records, or what it gives is changed in place ({why})",
            remedy=f"{use} without privacy.",
        )

    def _exact(self, parameters: list[nn.Parameter]) -> bool:
        """Whether these parameters alone have one gradient a text."""
        every = self.model.parameters()
        wanted = [p.requires_grad for p in every]
        chosen = {id(p) for p in parameters if p.requires_grad}
        try:
            for parameter in every:
                parameter.requires_grad_(id(parameter) in chosen)
            with self._attached() as attached:
                for rows in _BATCHES:
                    self._gradients(attached, rows)
            return True
        except Exception:
            return False
        finally:
            for parameter, trained in zip(every, wanted, strict=True):
                parameter.requires_grad_(trained)

    # --- the frozen prefix ---

    def prefix_agrees(self) -> bool:
        """Whether the states that are kept of frozen layers give what the whole model gives."""
        model = self.model
        if model.module.prefix is None:
            return False
        try:
            frozen = compute_frozen(model, self.encoded)
            for rows in (*_BATCHES, self.long):
                with torch.no_grad():
                    found = model.task.losses(
                        model.module, frozen.inputs(model, self.encoded, list(rows))
                    )
                error = (found - self.numbers(rows)).abs() / found.abs().clamp(min=1.0)
                if not bool((error <= _AGREE).all()):
                    return False
        except Exception:
            return False
        return True
