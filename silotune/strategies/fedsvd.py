"""FedSVD: as ffa, but the coordinator re-factorises BA after each round so that A is orthonormal.

Lee, Kim, Kim et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA"
(NeurIPS 2025).

Good for
    Privacy with several sites: sites train B alone, as in ffa, against an A whose rows are orthonormal
    and ordered by what was learned, which bounds the gradient of B and conditions its step.
Bytes
    Down one adapter (A changes); up half of it.
Linear
    Yes: the SVD is of the mean.
Privacy
    Post-processing of the aggregate.
Head
    Averaged like B.

The SVD of BA turns A within the space of its rows: ``A' = V^T``, ``B' = U S = B A A'^T``, so no round
leaves the random space that A started with. What changes is the metric in it. The optimizer's first
moment is turned alike, which is exact; the second, coordinate by coordinate, by the squares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from silotune.models.layout import Vector, pairs
from silotune.strategies.ffa import FrozenA
from silotune.strategies.server_optimizer import phase_of

Matrix = NDArray[np.float64]


class Refactored(FrozenA):
    """Weighted mean of B and of the head, then an SVD of each product BA; A travels down only."""

    def apply(self, adapter: Vector, mean: Vector, *, server_round: int) -> Vector:
        """The server optimizer's step with B and head, then new factors of the same products."""
        updated = self.step(adapter, mean, server_round=server_round)
        if phase_of(self.plan, server_round) == "head":
            return updated
        moments = zip(
            pairs(self.layout, updated),
            pairs(self.layout, self.optimizer.first),
            pairs(self.layout, self.optimizer.second),
            strict=True,
        )
        for pair, first, second in moments:
            A, B, turn = refactor(pair.A.astype(np.float64), pair.B.astype(np.float64))
            pair.A[...], pair.B[...] = A, B
            first.B[...] = first.B @ turn.T
            second.B[...] = second.B @ (turn**2).T
        return updated


def refactor(A: Matrix, B: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Factors of the same product, by its SVD, without forming it.

    Parameters
    ----------
    A, B : float64 arrays [r, in], [out, r]

    Returns
    -------
    A : float64 array [r, in]
        Orthonormal rows, the right singular vectors, largest singular value first.
    B : float64 array [out, r]
        Left singular vectors times singular values.
    turn : float64 array [r, r]
        The new A is ``turn @ A``, so a gradient of the old B is one of the new B after ``@ turn.T``.
    """
    basis, lower = np.linalg.qr(A.T)  # A = lower^T basis^T
    left, core = np.linalg.qr(B)
    U, S, Vt = np.linalg.svd(core @ lower.T)
    turned = Vt @ basis.T
    turn = Vt @ np.linalg.pinv(lower).T
    return turned, (left @ U) * S, turn
