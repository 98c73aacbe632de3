"""Which layer of a model it is: where a computation failed, or two of them parted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


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
