"""Canary records: texts that nobody wrote, with secrets that only training can tell; what tells them.

*Membership* asks how well scores tell canaries that were trained on from others. The score is a
likelihood ratio: the loss of a record under a reference model that never saw it, less its loss under the
model that perhaps did (Carlini et al., "Membership inference attacks from first principles", S&P 2022,
offline; with one reference, which here differs in the canaries alone).

*Memorisation* asks what a language model remembers of planted secrets: exposure, and completion.
Exposure is ``log2(n) - log2(rank)``, the rank being that of the true secret among n candidates by their
loss (Carlini, Liu, Erlingsson, Kos and Song, "The secret sharer", USENIX Security 2019). A secret before
all candidates has at least ``log2(n)`` bits; how many more is read off a normal distribution that is
fitted to the candidates' losses (theirs is skewed). A model that never saw the secret gives each rank
the same chance: some 1.44 bits in the mean, and b bits or more once in 2**b secrets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from silotune.privacy.attacks.bounds import Coins, Scores

Example = dict[str, str]

_SYLLABLES = ("ba", "den", "fo", "gri", "hul", "kas", "lim", "mo", "nar", "pel", "ru", "tiv", "zo")
_CODE_DIGITS = 6


@dataclass(frozen=True)
class Planted:
    """Canaries and their coins.

    Attributes
    ----------
    examples : list of Example
        By role, as a task reads them.
    coins : bool array [canaries]
        Which ones are trained on.
    """

    examples: list[Example]
    coins: NDArray[np.bool_]


def plant(count: int, *, labels: Sequence[str], seed: int | None, target: str = "label") -> Planted:
    """Make canaries: with labels a text and a random one of them, else a prompt and a random code.

    Parameters
    ----------
    count : int
        How many, in and out.
    labels : sequence of str
        Of a classification; empty for a language model.
    seed : int or None
        Equal seeds plant alike; None plants what nobody can foretell.
    target : str
        What has the label: "label", the text, or "spans", its first word.
    """
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        name = " ".join(_word(rng) for _ in range(4 if labels else 2))
        if labels:
            label = str(rng.choice(labels))
            span = {"start": 0, "end": name.index(" "), "label": label}
            shown = json.dumps([span], separators=(",", ":")) if target == "spans" else label
            examples.append({"text": f"{name} {number}", target: shown})
        else:
            examples.append({"prompt": f"code of {name} {number}", "response": code(rng)})
    return Planted(examples, rng.random(count) < 0.5)


def code(rng: np.random.Generator) -> str:
    """A secret: digits apart, so that each is a token or more of its own."""
    return " ".join(str(digit) for digit in rng.integers(0, 10, _CODE_DIGITS))


def _word(rng: np.random.Generator) -> str:
    return "".join(rng.choice(_SYLLABLES, size=int(rng.integers(2, 4))))


FALSE_ALARMS = 0.01
"""Rate of false alarms at which hits are counted: a few sure hits are worse than many vague ones."""


@dataclass(frozen=True, kw_only=True)
class Separation:
    """How far apart two sets of scores are.

    Attributes
    ----------
    auc : float
        Chance that a canary that was in has a larger score than one that was out: 0.5 for a guess.
    hits : float
        Part of the canaries that were in and are found, with `FALSE_ALARMS` of the others.
    """

    auc: float
    hits: float


def separation(scores: Scores, coins: Coins) -> Separation:
    """Compare the scores of canaries that were in with the others'.

    Raises
    ------
    ValueError
        All canaries are on one side.
    """
    inside, outside = np.sort(scores[coins]), np.sort(scores[~coins])
    if not len(inside) or not len(outside):
        raise ValueError("canaries are needed on both sides")
    below = np.searchsorted(outside, inside, side="left")
    level = np.searchsorted(outside, inside, side="right")
    threshold = outside[len(outside) - 1 - int(FALSE_ALARMS * len(outside))]
    return Separation(
        auc=float((below + level).mean() / 2 / len(outside)),
        hits=float((inside > threshold).mean()),
    )


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
