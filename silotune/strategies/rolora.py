"""RoLoRA: the rounds train B and A in turn.

Chen, Yu, Karimireddy et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of
LoRA" (NeurIPS 2025).

Good for
    What ffa is good for, where a random A is too poor: with one matrix fixed in a round the mean of
    the products is the product of the means, and over two rounds both are learned.
Bytes
    Down one adapter; up half of it, A or B.
Linear
    Yes: works under secure aggregation.
Privacy
    Post-processing. A round's noise is spread over one of the two matrices.
Head
    Averaged in every round.
"""

from __future__ import annotations

from silotune.models.layout import Part
from silotune.plan.plan import Plan
from silotune.strategies.linear import LinearStrategy


class Alternating(LinearStrategy):
    """Weighted mean of B in odd rounds of the adapter, of A in even ones, and of the head in all."""

    @classmethod
    def joint(cls, plan: Plan, server_round: int) -> frozenset[Part]:
        """B first: A has no gradient while B is zero."""
        turn = server_round - plan.head_rounds
        return frozenset({"B" if turn % 2 else "A", "head"})
