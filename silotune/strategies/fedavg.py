"""FedAvg and its one-step form, federated SGD.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (AISTATS
2017); for LoRA, FedIT (Zhang et al., ICASSP 2024): A and B are averaged apart.

Good for: everything linear; with one step a round it *is* pooled training. Costs one adapter up and
one down a site and round. Linear, so it works under secure aggregation. Safe under differential
privacy: it only post-processes what sites released. With several local steps the mean of the products
BA is not the product of the means; with one step there is nothing to mend. The head is averaged alike.
"""

from __future__ import annotations

import numpy as np

from silotune.errors import UpdateRejected
from silotune.strategies.base import AdapterStrategy, Terms, Vector
from silotune.strategies.reproducible_sum import ReproducibleSum

# Grids of the exact sum: gradient sums grow with the batch, weighted mean changes stay small.
_SUM_EXPONENT, _CHANGE_EXPONENT = -26, -36


class FedAvg(AdapterStrategy):
    """Weighted mean over sites with declared, never reported, weights.

    One local step: a site sends its (noisy, clipped) gradient sum; the aggregate is the sum over sites
    divided by the expected batches, q times the declared units. Several: a site sends its change, and
    the aggregate is the mean change by declared units (or equal weights, as the plan says).
    """

    def begin(self, server_round: int) -> None:
        """Start the sum of a round."""
        exponent = _SUM_EXPONENT if self.plan.rounds.local_steps == 1 else _CHANGE_EXPONENT
        self._sum = ReproducibleSum(self.update_size(server_round), exponent=exponent)
        self._mass = 0.0
        self._largest_weight = max((t.declared_units for t in self.cohort.values()), default=1)

    def fold(self, terms: Terms, update: Vector) -> None:
        """Add one site's update."""
        weight, mass = self._weight(terms)
        try:
            self._sum.add(update, weight)
        except ValueError as exc:
            raise UpdateRejected(f"site {terms.site}: {exc}") from exc
        self._mass += mass

    def _weight(self, terms: Terms) -> tuple[float, float]:
        """Factor of a site's update, and what it adds to the divisor."""
        equal = self.plan.aggregation.weights == "equal"
        if self.plan.rounds.local_steps == 1:
            batch = self.plan.expected_batch(terms.declared_units)
            return (1.0 / batch, 1.0) if equal else (1.0, batch)
        share = 1.0 if equal else terms.declared_units / self._largest_weight
        return share, share

    def finish(self, adapter: Vector, *, server_round: int) -> Vector:
        """Step the server optimizer with the aggregate."""
        if not self._mass:
            return adapter.copy()
        mean = self._sum.value(self._mass)
        gradient, start = {}, 0
        for group in self.groups(server_round):
            length = self.slices[group].stop - self.slices[group].start
            gradient[group] = mean[start : start + length]
            start += length
        if self.plan.rounds.local_steps > 1:
            gradient = {group: -np.asarray(values) for group, values in gradient.items()}
        return self.optimizer.step(adapter, gradient, server_round=server_round)
