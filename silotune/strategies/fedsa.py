"""FedSA-LoRA: sites share A and keep B to themselves.

Guo, Zeng, Wang, Fan, Bennis and Qu, "Selective Aggregation for Low-Rank Adaptation in Federated
Learning" (ICLR 2025).

Good for
    Sites whose tasks differ: A learns what is common, each B what is the site's own.
Bytes
    Up half an adapter, down one (B stays at its start in it).
Linear
    Yes: works under secure aggregation.
Privacy
    Post-processing. B is trained under the same noise and charge as if it were sent: later gradients
    of A are computed with it, and would give it away otherwise.
Head
    Shared and averaged, or kept at the site with ``aggregation.head = "local"``.

The global adapter has no trained B: a site that joins later starts with A, the head and B = 0.
"""

from __future__ import annotations

from silotune.models.layout import Part
from silotune.plan.plan import Plan
from silotune.strategies.linear import LinearStrategy


class KeptB(LinearStrategy):
    """Weighted mean of A, and of the head unless it is kept."""

    @classmethod
    def kept(cls, plan: Plan) -> frozenset[Part]:
        """B, and whatever else the plan keeps at the sites."""
        return super().kept(plan) | {"B"}
