"""A site's updates: asked of the training, held to the plan's form and bounds, given their noise.

What comes from the training is believed in nothing that can be computed or bounded without it: its shape
and type follow from the plan and the base model, a sum is no longer than any that the plan lets come
about, and wherever one step makes an update, the noise is added here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.client.run_files import SealedMemory, correlated_sums, with_own_parts
from silotune.client.terms import missing_noise, round_event, shortened_sums
from silotune.client.training.base import (
    Prior,
    RoundUpdate,
    Trained,
    Training,
    TrainingJob,
    Vector,
)
from silotune.client.troubles import Troubles
from silotune.errors import SelfCheckFailed
from silotune.models.layout import Layout, Part, Span
from silotune.privacy.noise import NoiseSource, noise_for, noised
from silotune.strategies import method_of
from silotune.strategies.site_privacy import hidden


class Updates:
    """The updates of one run at one site.

    Parameters
    ----------
    job : TrainingJob
        Whose updates, for which plan.
    training : Training
        Has the records.
    layout : Layout
        Of the site's adapter.
    memory : callable
        Gives what is kept between rounds; asked only if anything is.
    troubles : Troubles
        Told of rounds that failed.

    Attributes
    ----------
    seconds : dict of int to float
        Time spent training, by round.
    records_used : int
        Records trained on so far, repetitions counted: private.
    """

    def __init__(
        self,
        job: TrainingJob,
        *,
        training: Training,
        layout: Layout,
        memory: Callable[[], SealedMemory],
        troubles: Troubles,
    ) -> None:
        self._job, self._plan, self._training = job, job.plan, training
        self._layout, self._memory, self._troubles = layout, memory, troubles
        self._units = job.site.units_for(job.plan)
        self.seconds: dict[int, float] = {}
        self.records_used = 0

    def of_round(
        self, adapter: Vector, server_round: int, *, clip: float | None = None
    ) -> RoundUpdate:
        """A round's update: what the training gave, within its bounds, with what noise it lacks.

        Only noise that the ring of secure aggregation adds is still missing afterwards.
        """
        flat = self._trained(adapter, server_round, clip=clip)
        plan, spans, sigma = self._plan, self._spans(server_round), self._job.sigma()
        event, missing = round_event(plan, self._units, sigma=sigma), self._missing(server_round)
        if missing:
            flat = shortened_sums(plan, flat, spans, declared_units=self._units)
        if plan.privacy.noise == "shared":
            return RoundUpdate(flat=flat, event=event, missing_noise=missing)
        if missing:
            flat = self._noised(flat, missing, server_round)
        flat = method_of(plan).outgoing(plan, flat, declared_units=self._units)
        noise = self._noise("hidden", server_round)
        flat = hidden(plan, flat, clip=clip, sigma=sigma, noise=noise)
        return RoundUpdate(flat=flat, event=event)

    def _noised(
        self, sums: NDArray[Any], missing: Mapping[Part, float], server_round: int
    ) -> Vector:
        """Sums with their noise; where it is correlated over rounds, it is kept for the next ones."""
        spans, noise = self._spans(server_round), self._noise("update", server_round)
        if self._correlates:
            return correlated_sums(
                sums,
                server_round,
                plan=self._plan,
                spans=spans,
                missing=missing,
                memory=self._memory(),
                noise=noise,
            )
        stds, sizes = [missing[span.part] for span in spans], [span.size for span in spans]
        return noised(sums, stds, sizes, noise=noise)

    def _trained(self, adapter: Vector, server_round: int, *, clip: float | None) -> NDArray[Any]:
        """What the training gave for a round; of a private plan without records if that failed."""
        started = time.monotonic()
        prior = self.prior(before=server_round)
        try:
            found = self._training.round(adapter, server_round, clip=clip, prior=prior)
            self._require_form(found, server_round)
        except Exception as exc:
            if not self._plan.private:
                raise
            self._troubles.add("blank", round=server_round, error=exc)
            found = self._blank(adapter, server_round, clip=clip, prior=prior)
        if found.kept:
            self._memory().keep(server_round, found.kept)
        self.records_used += found.records
        waited = time.monotonic() - started
        self.seconds[server_round] = waited if found.seconds is None else found.seconds
        return found.flat

    def _blank(
        self, adapter: Vector, server_round: int, *, clip: float | None, prior: Prior | None
    ) -> Trained:
        """A round without records: zero where the noise is added here, else worked out without them."""
        if self._missing(server_round):
            flat = np.zeros(sum(span.size for span in self._spans(server_round)))
            return Trained(flat=flat, kept={}, records=0)
        found = self._training.blank(adapter, server_round, clip=clip, prior=prior)
        self._require_form(found, server_round)
        return found

    def _require_form(self, found: Trained, server_round: int) -> None:
        """Believe nothing of what the training gave but what can be seen to be so."""
        size = sum(span.size for span in self._spans(server_round))
        dtype = np.float64 if self._missing(server_round) else np.float32
        if found.flat.shape != (size,) or found.flat.dtype != dtype:
            raise SelfCheckFailed("the update is not of the plan's shape")
        if self._plan.private and not np.isfinite(found.flat).all():
            raise SelfCheckFailed("the update is not finite")

    def _missing(self, server_round: int) -> dict[Part, float]:
        parts = [span.part for span in self._spans(server_round)]
        return missing_noise(self._plan, parts, sigma=self._job.sigma())

    def _spans(self, server_round: int) -> tuple[Span, ...]:
        """Where the parts that are sent in a round lie in the adapter."""
        return self._layout.spans(method_of(self._plan).sent(self._plan, server_round))

    def prior(self, *, before: int) -> Prior | None:
        """What the strategy kept here in an earlier round, if it keeps anything."""
        return self._memory().recall(before=before) if self.keeps else None

    @property
    def keeps(self) -> bool:
        """Whether the strategy keeps anything at the site between rounds."""
        scaffold = self._plan.aggregation.strategy == "scaffold"
        return scaffold or bool(method_of(self._plan).kept(self._plan))

    @property
    def _correlates(self) -> bool:
        """Whether later rounds take back a part of a round's noise."""
        return self._plan.privacy.bands > 1

    @property
    def remembers(self) -> bool:
        """Whether a round leaves anything here for later rounds, once it is released."""
        return self.keeps or self._correlates

    @property
    def keeps_parts(self) -> bool:
        """Whether parts of the adapter stay at the site."""
        return bool(self._layout.spans(method_of(self._plan).kept(self._plan)))

    def personal(self, adapter: Vector, *, before: int) -> Vector | None:
        """An adapter with this site's own parts in it, as before a round; None if it keeps none."""
        if not self.keeps_parts:
            return None
        kept = method_of(self._plan).kept(self._plan)
        return with_own_parts(adapter, self.prior(before=before), self._layout.spans(kept))

    def _noise(self, purpose: str, server_round: int) -> NoiseSource:
        return noise_for(self._plan.plan.seed, purpose, self._job.site.name, server_round)
