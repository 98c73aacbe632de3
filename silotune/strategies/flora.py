"""FLoRA: the sites' adapters are stacked into the frozen weights, and everybody starts anew.

Wang, Shen, He et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations" (NeurIPS 2024). The stack ``[p_1 B_1 ... p_K B_K] [A_1; ...; A_K]`` is the weighted mean of
the products.

Good for
    Sites of different means: each trains at its own rank, and the mean of the products is exact
    whatever the ranks. Without noise, rounds of many local steps: the rank learned grows with rounds.
Bytes
    Up one adapter at the site's own rank. Down the same and the accumulated correction, a dense
    ``[out, in]`` matrix for each adapted layer: the stacks of all rounds, added up, so that a site
    that missed a round needs no history.
Linear
    No: the product needs each site's A and B.
Privacy
    Post-processing, but of each site's release. Under noise a poor choice: the optimizer's progress
    restarts at B = 0 each round, and noisy products are never averaged down again.
Head
    Averaged.

After a round B is zero and A random again, drawn for each round from the plan as the first A was.
"""

from __future__ import annotations

from typing import ClassVar

from silotune.models.layout import initial_matrix
from silotune.strategies.factors import Pair
from silotune.strategies.products import Product, ProductStrategy


class Stacking(ProductStrategy):
    """The mean product into the correction, and fresh matrices."""

    ranks: ClassVar[bool] = True

    def combine(self, pair: Pair, mean: Product, *, server_round: int) -> None:
        """Add the mean product to the correction; restart A and B."""
        assert pair.correction is not None  # the layout of this strategy has one
        pair.correction[...] += self.scale * mean
        name = f"{pair.name}.round{server_round}"
        pair.A[...] = initial_matrix(name, pair.A.shape, self.plan)
        pair.B[...] = 0.0
