"""The frozen lower layers of a model, run once a record instead of once a step.

With ``lora.last_layers`` nothing below the first adapted layer ever changes, so what that layer is
given for a record is a constant. It is kept in memory, unpadded, and put in place of the lower
layers' work: the same numbers to the rounding of another batch's padding, for about half the time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from silotune.models.task import Encoded, Rows

_LAYER = re.compile(r"^(.*)\.(\d+)\.")
_MOST_BYTES = 2**30  # of one site's records; more are not kept


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


class PrefixCache:
    """Hidden states of a site's records at the first trained layer, unpadded.

    Parameters
    ----------
    encoded : Encoded
        The records.
    size : int
        Width of the hidden states.
    tokens : Tensor, optional
        The states [tokens, size], if they are known already.
    """

    def __init__(self, encoded: Encoded, *, size: int, tokens: Tensor | None = None) -> None:
        self._offsets = encoded.offsets
        self._lengths = encoded.lengths
        shape = (int(self._offsets[-1]), size)
        self.tokens = torch.empty(shape) if tokens is None else tokens
        if self.tokens.shape != shape:
            raise ValueError(f"expected states of shape {shape}, got {tuple(self.tokens.shape)}")

    @classmethod
    def joined(cls, encoded: Encoded, parts: Sequence[PrefixCache]) -> PrefixCache:
        """One cache of several, for the records of all of them one after the other."""
        tokens = torch.cat([part.tokens for part in parts])
        return cls(encoded, size=tokens.shape[1], tokens=tokens)

    @staticmethod
    def fits(encoded: Encoded, *, size: int) -> bool:
        """Whether the records' hidden states are few enough to be kept."""
        return int(encoded.offsets[-1]) * size * 4 <= _MOST_BYTES

    def put(self, rows: Rows, hidden: Tensor) -> None:
        """Keep the hidden states [len(rows), longest, size] of some records, padded right."""
        for row, states in zip(rows, hidden.float().cpu(), strict=True):
            start, length = int(self._offsets[row]), int(self._lengths[row])
            self.tokens[start : start + length] = states[:length]

    def get(self, rows: Rows, device: torch.device) -> Tensor:
        """Hidden states [len(rows), longest, size] of some records, zero where padded."""
        chosen = np.asarray(rows, dtype=np.int64)
        lengths = self._lengths[chosen]
        columns = np.arange(int(lengths.max(initial=0)))[None, :]
        real = torch.from_numpy(columns < lengths[:, None])
        places = torch.from_numpy((self._offsets[chosen][:, None] + columns)[real.numpy()])
        padded = torch.zeros(*real.shape, self.tokens.shape[1])
        padded[real] = self.tokens[places]
        return padded.to(device)
