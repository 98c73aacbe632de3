"""FedEx-LoRA: what averaging the factors gets wrong is added to the frozen weights.

Singhal, Ponkshe and Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning
of Large Language Models" (ACL 2025).

Good for
    Exact averaging with several local steps where bytes are cheap: the residual
    ``mean(B_k A_k) - mean(B_k) mean(A_k)`` goes into a correction of the frozen weight.
Bytes
    Up one adapter; down one adapter and the correction, a dense ``[out, in]`` matrix for each adapted
    layer, since after a few rounds its rank is full. Every broadcast carries the whole of it, so a
    site that missed a round, or is new, needs no history.
Linear
    No: the residual needs each site's A and B.
Privacy
    Post-processing of what sites released, but of each site's release: no secure aggregation.
Head
    Averaged; it has no product.

The final adapter in PEFT's format holds the correction too, at the rank that takes.
"""

from __future__ import annotations

from silotune.strategies.factors import Pair
from silotune.strategies.products import Product, ProductStrategy


class ExactResidual(ProductStrategy):
    """Means of A and B, and the residual of their product in the correction."""

    def combine(self, pair: Pair, mean: Product, *, server_round: int) -> None:
        """Add the residual to the correction; A and B are the means already."""
        del server_round
        assert pair.correction is not None  # the layout of this strategy has one
        pair.correction[...] += self.scale * (mean - pair.B.astype(mean.dtype) @ pair.A)
