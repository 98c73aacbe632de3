"""Canary records: texts that nobody wrote, each with a secret that only training can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


def plant(count: int, *, labels: Sequence[str], seed: int | None) -> Planted:
    """Make canaries: with labels a text and a random one of them, else a prompt and a random code.

    Parameters
    ----------
    count : int
        How many, in and out.
    labels : sequence of str
        Of a classification; empty for a language model.
    seed : int or None
        Equal seeds plant alike; None plants what nobody can foretell.
    """
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        name = " ".join(_word(rng) for _ in range(4 if labels else 2))
        if labels:
            examples.append({"text": f"{name} {number}", "label": str(rng.choice(labels))})
        else:
            examples.append({"prompt": f"code of {name} {number}", "response": code(rng)})
    return Planted(examples, rng.random(count) < 0.5)


def code(rng: np.random.Generator) -> str:
    """A secret: digits apart, so that each is a token or more of its own."""
    return " ".join(str(digit) for digit in rng.integers(0, 10, _CODE_DIGITS))


def _word(rng: np.random.Generator) -> str:
    return "".join(rng.choice(_SYLLABLES, size=int(rng.integers(2, 4))))
