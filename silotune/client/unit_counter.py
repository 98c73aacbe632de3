"""A site's part of statistics, in the place of a trainer: it counts, and there is no model.

The one round gives the sum over units of `silotune.data.statistics.site_sums`, with the site's noise or,
where the noise is shared, without it and with word of the share that is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from silotune.client.terms import round_event
from silotune.client.trainer import RoundUpdate, Vector
from silotune.data.records import Records
from silotune.data.site import SiteConfig
from silotune.data.statistics import CountTokens, site_sums
from silotune.errors import SelfCheckFailed
from silotune.models.layout import Layout, Part, statistics_layout
from silotune.models.pretrained import load_tokenizer, locate
from silotune.plan.plan import Plan
from silotune.privacy.noise import NoiseSource, noise_for, noise_is_plausible
from silotune.strategies.secure import shared_noise


class UnitCounter:
    """Counts a site's units.

    Parameters
    ----------
    plan : Plan
        With ``model.task = "statistics"``.
    site : SiteConfig
        The site.
    sigma : float
        Noise multiplier of the whole release.
    records : callable or None
        Gives the site's records; None for a counter of nothing, whose round is noise alone.
    """

    def __init__(
        self,
        plan: Plan,
        site: SiteConfig,
        *,
        sigma: float,
        records: Callable[[], Records] | None,
    ) -> None:
        self._plan, self._site, self._sigma, self._records = plan, site, sigma, records
        self.records_used = 0

    @property
    def layout(self) -> Layout:
        """Of what is sent."""
        return statistics_layout(self._plan)

    def prepare(self) -> None:
        """Look at the records now: what is wrong with them is told at the site, early."""
        if self._records is not None:
            self._records()

    def round(
        self, adapter: Vector, server_round: int, *, clip: float | None = None
    ) -> RoundUpdate:
        """The sums; `adapter` and `clip` have no part in it."""
        del adapter, clip
        sums = np.zeros(self.layout.size)
        if self._records is not None:
            records = self._records()
            sums = site_sums(records, self._plan, count_tokens=self._count_tokens())
            self.records_used += len(records)
        declared = self._site.units_for(self._plan)
        event = round_event(self._plan, declared, sigma=self._sigma)
        if shares := self.shares({entry.part for entry in self.layout.entries}, sigma=self._sigma):
            return RoundUpdate(flat=sums, event=event, missing_noise=shares)
        noise = noise_for(self._plan.plan.seed, "train", self._site.name, server_round)
        return RoundUpdate(flat=_noisy(sums, self._sigma, noise), event=event)

    def shares(self, parts: Collection[Part], *, sigma: float) -> dict[Part, float]:
        """Standard deviation of one site's share of the noise, by part; empty if it is not shared."""
        shared = shared_noise(self._plan)
        return {} if shared is None else dict.fromkeys(parts, sigma / math.sqrt(shared.sharers))

    def _count_tokens(self) -> CountTokens | None:
        if not self._plan.model.base:
            return None
        tokenizer = load_tokenizer(locate(self._site.model_place(self._plan)))

        def count(texts: Sequence[str]) -> list[int]:
            found = tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]
            return [len(row) for row in found]

        return count


def _noisy(sums: NDArray[np.float64], sigma: float, noise: NoiseSource) -> Vector:
    """The sums with noise of their own. Raises `SelfCheckFailed` if it is not what was asked for."""
    found = noise.add(torch.from_numpy(sums), sigma).numpy()
    added = (found - sums) / sigma
    if not noise_is_plausible(float(added @ added), added.size):
        raise SelfCheckFailed("the noise of the statistics is not what was asked for")
    return np.asarray(found, dtype=np.float32)
