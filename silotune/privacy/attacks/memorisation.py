"""What a language model remembers of planted secrets: exposure, and completion.

Exposure is ``log2(n) - log2(rank)``, the rank being that of the true secret among n candidates by their
loss (Carlini, Liu, Erlingsson, Kos and Song, "The secret sharer", USENIX Security 2019). A secret before
all candidates has at least ``log2(n)`` bits; how many more is read off a normal distribution that is
fitted to the candidates' losses (theirs is skewed). A model that never saw the secret gives each rank
the same chance: some 1.44 bits in the mean, and b bits or more once in 2**b secrets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """What a model knows of secrets.

    Attributes
    ----------
    candidates : int
        Among which each secret was ranked, itself included.
    exposure, exposure_unseen : float
        Mean in bits, of secrets that were trained on and of others.
    largest : float
        The largest exposure of a secret that was trained on.
    extracted, secrets : int
        How many of those that were trained on the model completes by itself, of how many.
    extracted_unseen : int
        How many of the others.
    """

    candidates: int
    exposure: float
    exposure_unseen: float
    largest: float
    extracted: int
    secrets: int
    extracted_unseen: int


def exposures(losses: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exposure of secrets in bits.

    Parameters
    ----------
    losses : float64 array [secrets]
        Of each true secret.
    others : float64 array [secrets, candidates]
        Of other candidates in its place. A tie counts against the model.
    """
    ranks = 1 + (others < losses[:, None]).sum(1)
    bits = np.log2(others.shape[1] + 1) - np.log2(ranks)
    spread = np.maximum(others.std(1), np.finfo(np.float64).tiny)
    beyond = -log_ndtr((losses - others.mean(1)) / spread) / np.log(2.0)
    return np.asarray(np.where(ranks == 1, np.maximum(bits, beyond), bits), dtype=np.float64)


def memorisation(
    bits: NDArray[np.float64], completed: NDArray[np.bool_], coins: NDArray[np.bool_], *, among: int
) -> Memorisation:
    """Sum up exposures and completions of secrets, of which those with a coin were trained on."""
    inside = bits[coins]
    return Memorisation(
        candidates=among,
        exposure=float(inside.mean()) if len(inside) else 0.0,
        exposure_unseen=float(bits[~coins].mean()) if (~coins).any() else 0.0,
        largest=float(inside.max(initial=0.0)),
        extracted=int(completed[coins].sum()),
        secrets=int(coins.sum()),
        extracted_unseen=int(completed[~coins].sum()),
    )
