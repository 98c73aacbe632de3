"""FlexLoRA: the mean of the products, cut by SVD to the rank of the adapter and of each site.

Bai, Chen, Qian, Yao and Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
and Client Resources" (NeurIPS 2024).

Good for
    Sites of different means that share one adapter: each is sent the best approximation of the mean
    at its own rank. Exact where the rank suffices, else short by the singular values cut off.
Bytes
    One adapter up and one down, at the site's own rank.
Linear
    No: the product needs each site's A and B.
Privacy
    Post-processing, but of each site's release.
Head
    Averaged.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from silotune.strategies.factors import Pair
from silotune.strategies.products import Product, ProductStrategy


class Redistributed(ProductStrategy):
    """The truncated SVD of the mean product: B = U S, A = V^T, largest singular value first.

    Directions without a singular value get orthonormal rows of A and zero columns of B, so that they
    can still be learned.
    """

    ranks: ClassVar[bool] = True

    def combine(self, pair: Pair, mean: Product, *, server_round: int) -> None:
        """Replace A and B by the leading singular vectors and values."""
        del server_round
        rank = pair.A.shape[0]
        U, S, Vt = np.linalg.svd(mean, full_matrices=False)
        kept = min(rank, len(S))
        pair.A[:kept], pair.B[:, :kept] = Vt[:kept], U[:, :kept] * S[:kept]
        pair.A[kept:], pair.B[:, kept:] = 0.0, 0.0
