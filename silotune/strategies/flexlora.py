"""FlexLoRA: the mean of the products, cut by SVD to the rank of the adapter and of each site.

Bai, Chen, Qian, Yao and Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
and Client Resources" (NeurIPS 2024). A site sends the changes of its A, B and head after several local
steps; the coordinator, which knows what it sent, folds the product B_k A_k of the site's own matrices
into a running sum of one ``[out, in]`` matrix a layer.

Good for
    Sites of different means that share one adapter: each is sent the best approximation of the mean
    at its own rank. Exact where the rank suffices, else short by the singular values cut off.
Bytes
    One adapter up and one down, at the site's own rank.
Linear
    No: the product needs each site's A and B. Memory is for one site only all the same.
Privacy
    Post-processing, but of each site's release.
Head
    Averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from silotune.errors import UpdateRejected
from silotune.models.layout import Layout, Pair, Vector, gathered, pairs
from silotune.plan.plan import Plan
from silotune.protocol.requests import adapter_content, as_arrays
from silotune.strategies.base import AdapterStrategy, Terms
from silotune.strategies.linear import ReproducibleSum

_EXPONENT = -31  # of the grids of the exact sums; they hold numbers up to 512

Product = NDArray[np.float64]


class Redistributed(AdapterStrategy):
    """The truncated SVD of the mean product: B = U S, A = V^T, largest singular value first.

    Directions without a singular value are zero. Ranks may differ by site: a site of rank k is sent
    the first k rows of A and columns of B, and trains with the same scale ``alpha / r`` as everybody.
    """

    def __init__(self, plan: Plan, *, layout: Layout) -> None:
        super().__init__(plan, layout=layout)
        self._layouts = {plan.lora.r: layout}

    def layout_at(self, rank: int | None) -> Layout:
        """Layout of a site's own adapter."""
        wanted = rank or self.plan.lora.r
        if wanted not in self._layouts:
            self._layouts[wanted] = self.layout.at_rank(wanted)
        return self._layouts[wanted]

    def contents(
        self, arrays: ArrayRecord, config: ConfigRecord
    ) -> Iterator[tuple[int, RecordDict]]:
        """The adapter at each site's own rank."""
        flat = arrays["flat"].numpy()
        made: dict[int | None, RecordDict] = {None: adapter_content(arrays, config)}
        for node, terms in self.cohort.items():
            rank = None if terms.rank == self.plan.lora.r else terms.rank
            if rank not in made:
                smaller = as_arrays(self.layout.cut(flat, self.layout_at(rank)))
                made[rank] = adapter_content(smaller, config)
            yield node, made[rank]

    def begin(self, server_round: int, adapter: Vector) -> None:
        """Start the sums of a round."""
        self._adapter, self._round, self._mass = adapter, server_round, Fraction(0)
        self._changes = ReproducibleSum(self.update_size(server_round), exponent=_EXPONENT)
        layers = pairs(self.layout, adapter) if self._multiplies(server_round) else iter(())
        dense = sum(pair.A.shape[1] * pair.B.shape[0] for pair in layers)
        self._products = ReproducibleSum(dense, exponent=_EXPONENT)

    def fold(self, terms: Terms, update: Vector) -> None:
        """Add one site's changes and the products of its matrices."""
        layout, share = self.layout_at(terms.rank), self._share(terms)
        spans = layout.spans(self.sent(self.plan, self._round))
        expected = sum(span.size for span in spans)
        if update.shape != (expected,):
            raise UpdateRejected(
                f"site {terms.site}: expected {expected} numbers, got {update.size}"
            )
        change = layout.spread(spans, update)
        products = np.zeros(0)
        if self._multiplies(self._round):
            local = self.layout.cut(self._adapter, layout) + change
            products = _products(pairs(layout, local))
        sent = gathered(self.layout.widen(change, layout), self.spans(self._round))
        try:
            # Checked first: a rejected reply must leave both sums as they were.
            self._products.check(products, share)
            self._changes.add(sent, share)
        except ValueError as exc:
            raise UpdateRejected(f"site {terms.site}: {exc}") from exc
        self._products.add(products, share)
        self._mass += Fraction(share)

    def _multiplies(self, server_round: int) -> bool:
        """Whether a round trains more than the head."""
        return self.trained(self.plan, server_round) > {"head"}

    def _share(self, terms: Terms) -> float:
        largest = max((t.declared_units for t in self.cohort.values()), default=1)
        equal = self.plan.aggregation.weights == "equal"
        return 1.0 if equal else terms.declared_units / largest

    def finish(self, adapter: Vector, *, server_round: int) -> Vector:
        """New factors of each layer, and the mean of the head."""
        if not self._mass:
            return adapter.copy()
        mass = float(self._mass)
        mean = self._changes.value(mass)
        updated = adapter + self.layout.spread(self.spans(server_round), mean)
        if not self._multiplies(server_round):
            return updated
        means, start = self._products.mean(mass), 0
        for pair in pairs(self.layout, updated):
            shape = (pair.B.shape[0], pair.A.shape[1])
            end = start + shape[0] * shape[1]
            _refactor(pair, means[start:end].reshape(shape))
            start = end
        return updated


def _refactor(pair: Pair, mean: Product) -> None:
    """Replace A and B by the leading singular vectors and values of a mean product [out, in]."""
    U, S, Vt = np.linalg.svd(mean, full_matrices=False)
    kept = min(pair.A.shape[0], len(S))
    pair.A[:kept], pair.B[:, :kept] = Vt[:kept], U[:, :kept] * S[:kept]
    pair.A[kept:], pair.B[:, kept:] = 0.0, 0.0


def _products(layers: Iterator[Pair]) -> Product:
    found = [(pair.B.astype(np.float64) @ pair.A).ravel() for pair in layers]
    return np.concatenate(found) if found else np.zeros(0)
