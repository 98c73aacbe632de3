"""FedAvg and its one-step form, federated SGD.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (AISTATS
2017); for LoRA, FedIT (Zhang et al., ICASSP 2024): A and B are averaged apart.

Good for
    Everything; with one step a round it *is* pooled training.
Bytes
    One adapter up and one down, a site and round.
Linear
    Yes: works under secure aggregation.
Privacy
    Post-processing of what sites released.
Head
    Averaged like the rest.
Inexact
    With several local steps the mean of the products BA is not the product of the means. They differ
    by the weighted covariance of the sites' factors, mean((B_k - B)(A_k - A)); with one step, where
    gradients are averaged, there is nothing to mend.
"""

from __future__ import annotations

from silotune.strategies.linear import LinearStrategy


class FedAvg(LinearStrategy):
    """Weighted mean of A, of B and of the head, and the server optimizer's step with it."""
