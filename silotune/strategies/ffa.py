"""FFA-LoRA: A stays where it started, only B is trained and travels.

Sun, Li, Li and Ding, "Improving LoRA in Privacy-preserving Federated Learning" (ICLR 2024).

Good for
    Several local steps, and noise: the mean of B_k A is (mean B_k) A, so averaging is exact, and noise
    is never multiplied by noise as in a noisy B times a noisy A.
Bytes
    Half of fedavg's adapter, both ways: A is a function of the plan and is never sent.
Linear
    Yes: works under secure aggregation.
Privacy
    Post-processing. At the same clip norm the noise is spread over half the coordinates.
Head
    Averaged like B.
"""

from __future__ import annotations

from silotune.models.layout import Part
from silotune.plan.plan import Plan
from silotune.strategies.linear import LinearStrategy


class FrozenA(LinearStrategy):
    """Weighted mean of B and of the head; the layout has no A at all."""

    @classmethod
    def joint(cls, plan: Plan, server_round: int) -> frozenset[Part]:
        """B and the head."""
        del plan, server_round
        return frozenset({"B", "head"})
