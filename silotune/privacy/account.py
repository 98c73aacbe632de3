"""What the ledger speaks of: datasets, budgets, releases and the accounts of runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from silotune.privacy.tally import Tally

_DATASET = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}(@[0-9a-f]{8,64})?")
_RUN = re.compile(r".{1,200}")
_RELEASE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def require_dataset_key(key: str) -> str:
    """The key itself, if it is one: a name, or ``name@fingerprint`` of 8 to 64 hex digits.

    A fingerprint is sound only if contents with different ones have no privacy unit in common: each has
    a budget of its own. Raises `ValueError`.
    """
    if not _DATASET.fullmatch(key):
        raise ValueError(f"not a dataset name with an optional fingerprint: {key!r}")
    return key


@dataclass(frozen=True)
class Budget:
    """What a dataset may spend over its whole life."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class ReleaseKey:
    """What makes a release the same release: asked again, it is sent again and not charged again.

    Parameters
    ----------
    run : str
        The run's id: at most 200 printable characters.
    round : int
        From 1; 0 for what comes before the first round.
    release : str
        What it is within the round, e.g. ``"update"`` or ``"metrics"``: a short lower-case name.
    """

    run: str
    round: int
    release: str

    def __post_init__(self) -> None:
        if not _RUN.fullmatch(self.run) or not self.run.isprintable():
            raise ValueError("a run's id is 1 to 200 printable characters")
        if self.round < 0 or not _RELEASE.fullmatch(self.release):
            raise ValueError(f"not a release: round {self.round}, {self.release!r}")


@dataclass(frozen=True)
class RunAccount:
    """One run's account on one dataset.

    Attributes
    ----------
    reserved, charged : Mapping[str, int]
        Tallies: canonical JSON of a mechanism -> how often.
    open : bool
        Whether it may still charge what it reserved.
    charges : int
        Number of charged releases.
    """

    dataset: str
    run: str
    plan_sha256: str
    budget: Budget
    reserved: Mapping[str, int]
    open: bool = True
    charged: Mapping[str, int] = field(default_factory=dict)
    charges: int = 0

    @property
    def committed(self) -> Tally:
        """Charges, and what the reservation still allows on top of them."""
        charged = Counter(self.charged)
        return charged | Counter(self.reserved) if self.open else charged
