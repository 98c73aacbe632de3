"""Fixed random cosines between a text's features and the head: a wider head at no cost in epsilon.

Rahimi and Recht, "Random Features for Large-Scale Kernel Machines" (NeurIPS 2007): with frequencies w
drawn from a normal distribution and phases p uniform over a turn, the inner products of the features
cos(w · x + p) approximate a Gaussian kernel, so a linear head on them is a kernel machine. Neither is
trained nor looks at records: both are public functions of the plan.

They must be the same at every site, on every machine and in every version. So they come from an
extendable-output hash, and every step behind it is exact. SHAKE-256 over the ASCII text
``silotune cosines v1``, a zero byte and the source (``seed N`` for a plan with a seed, else
``plan HASH``) gives ``8 · number · hidden`` bytes, read as little-endian 64-bit words in the order
[number, hidden], then ``4 · number`` bytes of 32-bit words. A frequency is the number of ones in its
word less 32, over 4: a binomial number of mean 0 and variance 1, all but normal. A phase is 2 pi times
the leading 24 bits of its word over 2**24.

Frequencies are then multiplied by the plan's scale over the median distance of its public texts (the
median heuristic, without a look at anybody's records): that median is the base model's, and like the
centre it is the same at every site up to the rounding of another machine.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from silotune.errors import ModelError
from silotune.plan.plan import Plan

_TURN = 2.0 * math.pi


class Cosines(nn.Module):
    """Features [n, hidden] to [n, number], as long on average as feature_scale; nothing is trained.

    Parameters
    ----------
    frequencies : float32 array [number, hidden]
        Of features of length 1 before `feature_scale`, where the median distance is 1.
    phases : float32 array [number]
        In radians.
    feature_scale : float
        Factor of the features that come in, and length of those that go out.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(
        self,
        frequencies: NDArray[np.float32],
        phases: NDArray[np.float32],
        *,
        feature_scale: float,
    ) -> None:
        super().__init__()
        scaled = frequencies / np.float32(feature_scale)
        self.register_buffer("frequencies", torch.from_numpy(scaled))
        self.register_buffer("phases", torch.from_numpy(phases))
        self.factor = feature_scale * math.sqrt(2.0 / len(phases))

    @classmethod
    def of(cls, plan: Plan, *, hidden: int) -> Cosines | None:
        """The plan's, for features of this width; None if it has none."""
        chosen = plan.model.head_features
        if chosen is None:
            return None
        frequencies, phases = drawn(plan, number=chosen.number, hidden=hidden)
        scaled = frequencies * np.float32(chosen.scale)
        return cls(scaled, phases, feature_scale=plan.model.feature_scale)

    def fit(self, public: Tensor) -> None:
        """Measure distances in the median one between public embeddings [texts, hidden]; once."""
        median = torch.pdist(public).median()
        if not median > 0:
            raise ModelError("model.centre_texts: the base model can't tell these texts apart")
        self.frequencies /= median

    def forward(self, features: Tensor) -> Tensor:
        """Cosines of the features [n, hidden], float32 of shape [n, number]."""
        return torch.cos(features @ self.frequencies.T + self.phases) * self.factor


def drawn(
    plan: Plan, *, number: int, hidden: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Frequencies [number, hidden] of variance 1 and phases [number], from the plan alone."""
    seed = plan.plan.seed
    source = f"plan {plan.sha256}" if seed is None else f"seed {seed}"
    stream = hashlib.shake_256(f"silotune cosines v1\0{source}".encode())
    size = 8 * number * hidden
    raw = stream.digest(size + 4 * number)
    ones = np.bitwise_count(np.frombuffer(raw[:size], dtype="<u8")).astype(np.float32)
    turns = (np.frombuffer(raw[size:], dtype="<u4") >> 8).astype(np.float64) * 2.0**-24
    frequencies: NDArray[np.float32] = (ones.reshape(number, hidden) - 32.0) / 4.0
    return frequencies, (turns * _TURN).astype(np.float32)
