"""What a site's part in a run asks of whoever reads the records: five questions, no key, no ledger.

`silotune.client.site_run.SiteRun` charges, adds noise and releases; a `Training` has the records and the
model. In a simulation both are in one process (`silotune.client.model_cache.LocalTraining`), at a real
site the training is in a process of its own (`silotune.client.training.process`). The questions are the
same, and so are the answers: what comes back is a vector of the plan's shape, and what has to be
remembered until the next round, which the asking side keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from silotune.client.run_files import Arrays
from silotune.data.site import SiteConfig
from silotune.models.layout import Layout, Part, statistics_layout
from silotune.plan.plan import Plan
from silotune.privacy.events import DpEvent

Vector = NDArray[np.float32]
Prior = tuple[int, Arrays]
"""What a strategy kept at the site: in which round, and the arrays."""


@dataclass(frozen=True, kw_only=True)
class RecordsRead:
    """What was found when records were read: for the site's own log.

    Attributes
    ----------
    records : int
        How many are used.
    rows_left_out : int
        How many rows of the source are not.
    left_out : tuple of str
        Which, and why, in words.
    fingerprint : str
        `Records.fingerprint`, 64 hexadecimal digits.
    """

    records: int
    rows_left_out: int
    left_out: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What a training is for.

    Attributes
    ----------
    site : SiteConfig
        Where the records are.
    plan : Plan
        What is to be trained.
    base : str
        Where the base model is on this machine.
    rank : int
        Of this site's adapter.
    sigma : callable
        Noise multiplier of a step; asked when first needed.
    secret : callable
        The secret of the records' split; asked when they are read.
    on_records : callable
        Told each time they were read.
    """

    site: SiteConfig
    plan: Plan
    base: str
    rank: int
    sigma: Callable[[], float]
    secret: Callable[[], bytes]
    on_records: Callable[[RecordsRead], None]


@dataclass(frozen=True, kw_only=True)
class LoadedAs:
    """What a model is once it is loaded: of the base model, the plan and the machine alone.

    Attributes
    ----------
    layout : Layout
        Of the adapter, at this site's rank.
    dtype : str
        Type of the matrix products: ``float32`` or ``bfloat16``.
    """

    layout: Layout
    dtype: str


def sums_of(plan: Plan) -> LoadedAs:
    """What stands for the model where a plan asks for statistics: none is loaded."""
    return LoadedAs(layout=statistics_layout(plan), dtype="float64")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a round came to.

    Attributes
    ----------
    flat : float32 or float64 array
        Of the parts that are sent: the sum of clipped gradients, or the change.
    kept : mapping of name to array
        What the strategy keeps at the site until the next round; empty for most.
    records : int
        Records trained on, repetitions counted: private.
    seconds : float or None
        What it took, if that is not how long it was waited for.
    """

    flat: NDArray[Any]
    kept: Arrays
    records: int
    seconds: float | None = None


class Training(Protocol):
    """A site's records and model for one run."""

    def layout(self) -> Layout:
        """The adapter's layout at the plan's rank; no weight is loaded for it."""

    def loaded(self) -> LoadedAs:
        """Load the model and try it, before any record is read."""

    def weights_sha256(self) -> str | None:
        """Hash of the base model's weights here; None if the plan has none."""

    def prepare(self) -> None:
        """Read the records, and do what would otherwise keep the first round waiting."""

    def round(
        self, adapter: Vector, server_round: int, *, clip: float | None, prior: Prior | None
    ) -> Trained:
        """The steps of a round; noise that `silotune.client.terms.missing_noise` names is not in it."""

    def blank(
        self, adapter: Vector, server_round: int, *, clip: float | None, prior: Prior | None
    ) -> Trained:
        """The same round of a site without records, worked out where none was ever read."""

    def tables(self, adapter: Vector, *, prior: Prior | None) -> Mapping[str, NDArray[np.float64]]:
        """``counts`` on the validation units, and ``personal`` where the site keeps parts."""

    def close(self) -> None:
        """Give back memory and devices; what is asked afterwards begins anew."""


class Trainers(Protocol):
    """Gives each run its training."""

    def training(self, job: TrainingJob) -> Training:
        """The training of a run."""


@dataclass(frozen=True, kw_only=True)
class RoundUpdate:
    """What one round produced at a site, before the gate.

    Attributes
    ----------
    flat : float32 array
        The update of the parts that are sent, in the order of the layout.
    event : DpEvent or None
        What the update costs; None without privacy.
    missing_noise : mapping of part to float
        Standard deviation of the noise that has yet to be added: `flat`, in float64 then, is without.
    """

    flat: NDArray[Any]
    event: DpEvent | None
    missing_noise: Mapping[Part, float] = field(default_factory=dict)
