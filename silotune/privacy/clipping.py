"""Per-sample gradients of LoRA and small trained layers, in one ordinary backward pass.

`attach` replaces the forward of each LoRA layer and of each trained ``nn.Linear`` of a model by a
function of `silotune.privacy.layers`. After ``losses.sum().backward()`` every trained parameter has
``p.grad_sample`` of shape ``[n, *p.shape]`` in float32, exactly the gradients of the ``n`` losses one
by one. A trained layer of another kind is left to Opacus' own hooks where Opacus has an exact rule
for it, and is refused by name where it has none: nothing is ever approximated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from opacus.grad_sample import GradSampleHooks
from peft import PeftModel, PeftType
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.pytorch_utils import Conv1D

from silotune.errors import LayerUnsupported, SelfCheckFailed
from silotune.privacy.layers import (
    CastCache,
    FrozenLinear,
    GradientSink,
    InputCast,
    LoraSite,
    MergedLora,
    SplitLora,
    Stack,
    TrainedLinear,
)
from silotune.privacy.quantized import QuantizedLinear

_Forward = Callable[..., Any]
_BASES = {nn.Linear, Conv1D, QuantizedLinear}
# Below this many weights a reduced-precision copy saves no time worth its conversion.
_SMALLEST_CAST = 10_000


class Attached:
    """A model whose trained layers give per-sample gradients; made by `attach`.

    Attributes
    ----------
    private : bool
        False for the non-private twin: same layers, ordinary ``p.grad``.
    dtype : torch.dtype
        Type of the matrix products of frozen and LoRA layers.
    parameters : dict[str, nn.Parameter]
        Every trained parameter by its name in the module, in the module's order.
    norms_checked : bool
        Whether an engine has measured the clipped norms of a whole batch.
    user : object
        The engine that was made last; only it may step.
    stack : Stack or None
        Adapters that stand in for the module's own, for the time being: `StackedSgd` sets it.
    description : str
        Which layers run how, in one line.
    """

    def __init__(self, module: nn.Module, *, private: bool, dtype: torch.dtype) -> None:
        self.private = private
        self.dtype = dtype
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._sink = GradientSink(private=private)
        self._cast = InputCast(dtype)
        self._patched: list[tuple[nn.Module, _Forward | None]] = []
        self._hooks: list[tuple[str, nn.Module, Any]] = []
        self._counts = {"merged LoRA": 0, "split LoRA": 0, "trained linear": 0, "frozen linear": 0}
        self._names = {id(p): n for n, p in self.parameters.items()}
        self._still = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self.norms_checked = False
        self.user: object = None
        self.stack: Stack | None = None

    @property
    def description(self) -> str:  # noqa: D102 - documented as an attribute
        parts = [f"{count} {kind}" for kind, count in self._counts.items() if count]
        hooked = [f"{name} ({type(layer).__name__})" for name, layer, _ in self._hooks]
        if hooked:
            parts.append("Opacus hooks for " + ", ".join(hooked))
        kind = "per-sample gradients" if self.private else "ordinary gradients"
        return f"{kind}, {str(self.dtype).removeprefix('torch.')} products: " + ", ".join(parts)

    def name_of(self, parameter: nn.Parameter) -> str:
        """Name of a trained parameter in the module. Raises ``KeyError`` for any other tensor."""
        return self._names[id(parameter)]

    def clear(self) -> None:
        """Forget all gradients, ordinary and per-sample."""
        for parameter in self.parameters.values():
            parameter.grad = None
            cast(Any, parameter).grad_sample = None

    def check_gradients(self, parameters: tuple[nn.Parameter, ...], n: int) -> None:
        """Whether a backward over `n` losses left `n` gradients at each of `parameters`.

        Raises
        ------
        SelfCheckFailed
            A parameter has no gradients, has them for another number of samples (its layer does not
            see the batch as first dimension), or got an ordinary gradient too, that is, it was used
            outside its layer, past the per-sample rule; or batch normalisation was set to training.
        """
        if self.private and any(layer.training for layer in self._still):
            raise SelfCheckFailed("batch normalisation mixed the records of a batch")
        hooked = {id(p) for _, layer, _ in self._hooks for p in layer.parameters()}
        for parameter in parameters:
            samples = getattr(cast(Any, parameter), "grad_sample", None)
            name = self.name_of(parameter)
            if samples is None:
                raise SelfCheckFailed(f"no gradient reached {name}")
            if isinstance(samples, list) or samples.shape != (n, *parameter.shape):
                raise SelfCheckFailed(f"the gradients of {name} are not one a sequence")
            if id(parameter) in hooked:
                self._check_hooked(name, parameter, samples)
            elif parameter.grad is not None:
                raise SelfCheckFailed(f"{name} was used outside its layer")

    def _check_hooked(self, name: str, parameter: nn.Parameter, samples: Tensor) -> None:
        """Opacus' gradients of a layer must add up to autograd's: they see the same uses."""
        assert parameter.grad is not None
        total, expected = samples.sum(0, dtype=torch.float32), parameter.grad.float()
        scale = torch.linalg.vector_norm(samples.flatten(1), dim=1).sum()
        if torch.linalg.vector_norm(total - expected) > 1e-3 * scale + 1e-12:
            raise SelfCheckFailed(f"per-sample gradients of {name} do not add up to its gradient")

    def patch(self, kind: str, module: nn.Module, forward: _Forward) -> None:
        """Replace the forward of one layer until `detach`."""
        self._patched.append((module, module.__dict__.get("forward")))
        module.forward = forward
        self._counts[kind] += 1

    def hook(self, name: str, layer: nn.Module) -> None:
        """Leave one layer to Opacus' hooks until `detach`."""
        self._hooks.append((name, layer, GradSampleHooks(layer, loss_reduction="sum")))

    def detach(self) -> None:
        """Put every forward and parameter back as it was before `attach`."""
        for module, earlier in reversed(self._patched):
            if earlier is None:
                del module.__dict__["forward"]
            else:
                module.forward = earlier
        for _, layer, hooks in self._hooks:
            hooks.cleanup()
            # Opacus' cleanup leaves the list in which it kept activations.
            layer.__dict__.pop("activations", None)
        for parameter in self.parameters.values():
            for attribute in ("grad_sample", "summed_grad"):
                if hasattr(parameter, attribute):
                    delattr(parameter, attribute)
        self._patched.clear()
        self._hooks.clear()


def attach(
    module: nn.Module, *, private: bool = True, dtype: torch.dtype = torch.float32
) -> Attached:
    """Make the trained layers of a model give per-sample gradients.

    Covered exactly: PEFT LoRA (also rsLoRA, frozen A or B, dropout, trained base bias) on any
    ``nn.Linear`` or ``Conv1D``, and any trained ``nn.Linear``, the module itself included.
    Layers may be used several times in a step, and under gradient checkpointing.

    Parameters
    ----------
    module : nn.Module
        On its device already, adapters in place. Each layer must see the batch as first dimension.
    private : bool
        False builds the non-private twin, with ordinary gradients in ``p.grad``.
    dtype : torch.dtype
        ``torch.float32``, or ``torch.bfloat16`` for the products of all frozen and merged weights.
        Everything between the layers, and all gradients of parameters, stay in float32.

    Returns
    -------
    Attached

    Raises
    ------
    LayerUnsupported
        Under privacy, a trained layer without an exact per-sample rule; the module is untouched.
    LayerUnsupported
        Whether private or not, an adapter of PEFT's by another method than LoRA.
    ValueError
        Another `dtype`.
    """
    if dtype not in {torch.float32, torch.bfloat16}:
        raise ValueError(f"matrix products are float32 or bfloat16, not {dtype}")
    _refuse_other_methods(module)
    attached = Attached(module, private=private, dtype=dtype)
    for step in list(_survey(module, attached)):
        step()
    for parameter in attached.parameters.values():
        if private:
            cast(Any, parameter).grad_sample = None
    return attached


def _refuse_other_methods(module: nn.Module) -> None:
    """Refuse what PEFT may train besides LoRA: some of it is no layer, and would pass unseen."""
    for part in module.modules():
        for config in part.peft_config.values() if isinstance(part, PeftModel) else ():
            if config.peft_type != PeftType.LORA:
                raise LayerUnsupported(
                    f"PEFT's {config.peft_type.value} is not supported: use LoRA"
                )


def _survey(module: nn.Module, attached: Attached) -> Iterator[Callable[[], None]]:
    """Look at every layer; yield what to do with it. Nothing is changed before all are seen."""
    inside: set[int] = set()
    owners = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
    for name, layer in module.named_modules():
        shown = name or type(layer).__name__
        if attached.private:
            _refuse_inexact(shown, layer)
        if id(layer) in inside:
            continue
        if type(layer) is PeftLoraLinear and _lora_problem(layer) is None:
            inside |= {id(part) for part in layer.modules()}
            yield _lora_step(layer, attached)
        elif isinstance(layer, BaseTunerLayer) and _trains(layer, recurse=True):
            if attached.private:
                raise LayerUnsupported(f"{shown}: {_adapter_problem(layer)}")
            inside |= {id(part) for part in layer.modules()}
        elif type(layer) is nn.Linear:
            if _trains(layer):
                yield _trained_step(layer, attached)
            elif attached.dtype != layer.weight.dtype and layer.weight.numel() >= _SMALLEST_CAST:
                yield _frozen_step(layer, attached)
        elif isinstance(layer, QuantizedLinear) and attached.dtype != torch.float32:
            reduced = partial(layer.product, dtype=attached.dtype)
            yield partial(attached.patch, "frozen linear", layer, reduced)
        elif attached.private and _trains(layer):
            _refuse_unhooked(shown, layer, owners)
            yield partial(attached.hook, shown, layer)


def _trains(layer: nn.Module, *, recurse: bool = False) -> bool:
    return any(p.requires_grad for p in layer.parameters(recurse=recurse))


def _refuse_inexact(name: str, layer: nn.Module) -> None:
    """Refuse what no rule makes exact: mixed records, and norms taken in reduced precision."""
    if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
        raise LayerUnsupported(f"{name}: batch normalisation mixes the records of a batch")
    for part, parameter in layer.named_parameters(recurse=False):
        if parameter.requires_grad and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise LayerUnsupported(f"{name}.{part}: trained in {kind}; it must be float32")


def _lora_problem(layer: PeftLoraLinear) -> str | None:
    """Why a PEFT LoRA linear layer can't run as one function, or None."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active at once; exactly one is possible"
    (name,) = active
    variant = layer.lora_variant.get(name)
    kind = type(variant).__name__.removesuffix("LinearVariant")
    base = layer.base_layer
    problems = (
        (variant is not None, f"the LoRA variant {kind} has no exact per-sample gradient"),
        (layer.lora_bias[name], "lora_bias has no per-sample rule"),
        (layer.merged, "the adapter is merged into the base weight; unmerge it first"),
        (type(base) not in _BASES, f"LoRA on a {type(base).__name__} has no rule"),
        (_trains(base) and base.weight.requires_grad, "its base weight is trained too"),
    )
    return next((text for holds, text in problems if holds), None)


def _adapter_problem(layer: BaseTunerLayer) -> str:
    if type(layer) is PeftLoraLinear:
        return _lora_problem(layer) or "not supported"
    kind = "LoRA" if isinstance(layer, LoraLayer) else type(layer).__name__
    base = type(layer.get_base_layer()).__name__
    return f"{kind} on {base} has no exact per-sample gradient"


def _lora_step(layer: PeftLoraLinear, attached: Attached) -> Callable[[], None]:
    (name,) = (a for a in layer.active_adapters if a in layer.lora_A)
    dropout = layer.lora_dropout[name]
    few_bits = isinstance(layer.base_layer, QuantizedLinear)
    site = LoraSite(
        base=layer.base_layer,
        transposed=layer.fan_in_fan_out and not few_bits,
        a=layer.lora_A[name].weight,
        b=layer.lora_B[name].weight,
        scale=layer.scaling[name],
        sink=attached._sink,
        cast=attached._cast,
    )
    plain = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or layer.disable_adapters or layer.merged:
            return plain(x, *args, **kwargs)
        site.scale = layer.scaling[name]
        with torch.autocast(x.device.type, enabled=False):
            if attached.stack is not None:
                return attached.stack.lora(x, dropout(x), site)
            if few_bits or (dropout.training and not isinstance(dropout, nn.Identity)):
                return SplitLora.apply(  # type: ignore[no-untyped-call]
                    x, dropout(x), site.a, site.b, site.bias, site
                )
            return MergedLora.apply(x, site.a, site.b, site.bias, site)  # type: ignore[no-untyped-call]

    kind = "merged LoRA" if isinstance(dropout, nn.Identity) and not few_bits else "split LoRA"
    return partial(attached.patch, kind, layer, forward)


def _trained_step(layer: nn.Linear, attached: Attached) -> Callable[[], None]:
    def forward(x: Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            if attached.stack is not None:
                return attached.stack.linear(x, layer)
            return TrainedLinear.apply(x, layer.weight, layer.bias, attached._sink)  # type: ignore[no-untyped-call]

    return partial(attached.patch, "trained linear", layer, forward)


def _frozen_step(layer: nn.Linear, attached: Attached) -> Callable[[], None]:
    weight, bias = CastCache(attached.dtype), CastCache(attached.dtype)

    def forward(x: Tensor) -> Any:
        cast_bias = None if layer.bias is None else bias.get(layer.bias)
        with torch.autocast(x.device.type, enabled=False):
            return FrozenLinear.apply(x, weight.get(layer.weight), cast_bias, attached._cast)  # type: ignore[no-untyped-call]

    return partial(attached.patch, "frozen linear", layer, forward)


def _refuse_unhooked(name: str, layer: nn.Module, owners: Counter[int]) -> None:
    """Refuse a layer for which Opacus has no exact rule of its own."""
    trained = {n: p for n, p in layer.named_parameters(recurse=False) if p.requires_grad}
    listed = ", ".join(trained)
    if type(layer) not in GradSampleHooks.GRAD_SAMPLERS or list(layer.buffers()):
        raise LayerUnsupported(f"{name}: no exact per-sample gradient for its {listed}")
    if any(owners[id(parameter)] > 1 for parameter in trained.values()):
        raise LayerUnsupported(f"{name}: its {listed} is shared with another layer")
