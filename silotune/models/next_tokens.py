"""The loss of next tokens over a large vocabulary, without its logits ever being there at once.

A language model's logits are most of a training step's memory: tokens times vocabulary, several times
over. Here the output layer is run on a few positions at a time, and of each part are kept the losses and
their gradients by the layer's input, which is all that the backward pass needs of a frozen layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_LOGITS = 1 << 23  # that are made at a time: 32 MB


class NextTokenLosses(torch.autograd.Function):
    """Negative log-likelihood of each token, float32 [m], from what the output layer is given."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, tokens: Tensor, output: Callable[[Tensor], Tensor], size: int
    ) -> Tensor:
        """Losses [m] of `tokens` [m] after states `hidden` [m, width].

        `output` gives the logits [n, vocabulary] of some states, and is frozen; `size` is how many
        states it is given at a time.
        """
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            states = hidden[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = output(states).float()
            # From here on in place: a linear layer's backward has no use for what it gave.
            shares, chosen = logits.detach(), tokens[part, None]
            shares.sub_(shares.amax(1, keepdim=True))
            given = shares.gather(1, chosen)
            total = shares.exp_().sum(1, keepdim=True)
            losses[part] = (total.log() - given).squeeze(1)
            if gradient is not None:
                shares.div_(total).scatter_add_(1, chosen, torch.full_like(given, -1.0))
                (gradient[part],) = torch.autograd.grad(logits, states, shares)
        ctx.gradient = gradient
        return losses

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the states."""
        return ctx.gradient * dy[:, None].to(ctx.gradient.dtype), None, None, None


def next_token_losses(
    hidden: Tensor, tokens: Tensor, output: nn.Module, *, vocabulary: int
) -> Tensor:
    """`NextTokenLosses` of states [m, width], as many at a time as the vocabulary allows."""
    size = max(1, _LOGITS // vocabulary)
    found: Tensor = NextTokenLosses.apply(hidden, tokens, output, size)  # type: ignore[no-untyped-call]
    return found


@contextmanager
def passed_through(layer: nn.Module) -> Iterator[None]:
    """Have a layer give what it is given, for the time being."""
    own = layer.__dict__.get("forward")
    layer.forward = lambda states: states
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def plain_output(model: Any, run: Callable[[], Tensor]) -> nn.Module | None:
    """The output layer of a model whose logits are what that layer gives; None if it changes them.

    Parameters
    ----------
    model : PreTrainedModel
        The base model.
    run : callable
        Gives the model's logits of some text.
    """
    layer, seen = model.get_output_embeddings(), list[tuple[Tensor, int]]()
    if not isinstance(layer, nn.Module):
        return None
    handle = layer.register_forward_hook(
        lambda layer, args, output: seen.append((output, output._version))
    )
    try:
        logits = run()
    finally:
        handle.remove()
    # The very tensor, and not written to since: a soft cap or a scale gives another, or a later version.
    given, version = seen[0] if len(seen) == 1 else (None, 0)
    return layer if logits is given and logits._version == version else None
