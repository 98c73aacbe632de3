"""Statistics: the noisy sums of the sites, added up and nothing else.

Sums travel as an adapter's head does (`silotune.models.layout.statistics_layout`), and what this
strategy makes of a round is no step from an adapter but the sum itself. Beside it stands what its
intervals are made of: which sites are in it, and how much noise that is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.models.layout import Layout, Vector
from silotune.plan.plan import Plan
from silotune.strategies.base import Terms
from silotune.strategies.linear import LinearStrategy, ReproducibleSum
from silotune.strategies.secure import shared_noise

_EXPONENT = -12  # of the exact sum: room for 2**28 units a site, a thousandth of any noise
_SITES = "sites"


class Sums(LinearStrategy):
    """The sum of the sites' noisy sums.

    Attributes
    ----------
    names : tuple of str
        Sites whose sums are in it.
    """

    def __init__(self, plan: Plan, *, layout: Layout) -> None:
        super().__init__(plan, layout=layout)
        self.names: tuple[str, ...] = ()

    def begin(self, server_round: int, adapter: Vector) -> None:
        """Start the sum."""
        super().begin(server_round, adapter)
        self._sum = ReproducibleSum(self.update_size(server_round), exponent=_EXPONENT)
        self.names = ()

    def fold(self, terms: Terms, update: Vector) -> None:
        """Add one site's sum."""
        super().fold(terms, update)
        self.note([terms.site])

    def note(self, sites: Collection[str]) -> None:
        """Write down that these sites are in the sum."""
        self.names = tuple(sorted({*self.names, *sites}))

    def finish(self, adapter: Vector, *, server_round: int) -> Vector:
        """The sum, whatever was there before; `adapter` itself without replies."""
        del server_round
        return self._sum.value(1.0) if self.names else adapter.copy()

    @property
    def noise_variance(self) -> float:
        """Variance of the noise on each number of the sum, by what the sites declared."""
        shared = shared_noise(self.plan)
        declared = {terms.site: terms.sigma or 0.0 for terms in self.cohort.values()}
        # All have one noise multiplier; a site of the sum may be away after a restart.
        usual = max(declared.values(), default=0.0)
        total = sum(declared.get(site, usual) ** 2 for site in self.names)
        return total / shared.sharers if shared else total

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that `restore` takes back."""
        named = np.frombuffer(json.dumps(self.names).encode(), dtype=np.uint8)
        return super().state() | {_SITES: named}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a saved `state`."""
        super().restore(state)
        self.names = tuple(json.loads(state[_SITES].tobytes()))
