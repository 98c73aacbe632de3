"""What a strategy must do that lets ranks differ by site."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord

from silotune.errors import UpdateRejected
from silotune.models.layout import pairs
from silotune.protocol.requests import as_arrays
from tests.strategies.contract import StrategyContract, cohort


class HeterogeneousRanks(StrategyContract):
    def mixed(self):
        """Three sites, the second of rank 1."""
        terms = cohort(3)
        return [terms[0], replace(terms[1], rank=1), replace(terms[2], rank=2)]

    def test_an_adapter_arrives_at_each_site_at_its_own_rank(self):
        strategy, start = self.fresh(self.mixed()), self.start()
        sent = dict(strategy.contents(as_arrays(start), ConfigRecord()))
        flats = [sent[t.node].array_records["arrays"]["flat"].numpy() for t in self.mixed()]
        assert flats[0].tobytes() == flats[2].tobytes() == start.tobytes()
        (small,) = pairs(self.layout().at_rank(1), flats[1])
        (full,) = pairs(self.layout(), start)
        np.testing.assert_array_equal(small.A, full.A[:1])
        np.testing.assert_array_equal(small.B, full.B[:, :1])
        assert flats[1][-10:].tobytes() == start[-10:].tobytes()

    def test_a_smaller_site_counts_with_its_own_product(self):
        terms, start = self.mixed(), self.start()
        layouts = [self.layout(), self.layout().at_rank(1), self.layout()]
        rng = np.random.default_rng(4)
        parts = {"A", "B", "head"}
        updates, products = [], []
        for layout in layouts:
            spans = layout.spans(parts)
            size = sum(span.stop - span.start for span in spans)
            update = rng.normal(size=size).astype(np.float32)
            own = self.layout().cut(start, layout) + layout.spread(spans, update)
            (pair,) = pairs(layout, own)
            updates.append(update)
            products.append(np.float64(pair.B) @ pair.A)
        weights = [t.declared_units for t in terms]
        mean = np.average(products, axis=0, weights=weights)
        (after,) = pairs(self.layout(), self.aggregate(terms, updates, adapter=start))
        U, S, Vt = np.linalg.svd(mean)
        np.testing.assert_allclose(
            np.float64(after.B) @ after.A, (U[:, :2] * S[:2]) @ Vt[:2], atol=1e-5
        )

    def test_an_update_of_another_sites_rank_is_rejected(self):
        strategy = self.fresh(self.mixed())
        strategy.begin(1, self.start())
        with pytest.raises(UpdateRejected, match="site s0001: expected"):
            strategy.fold(self.mixed()[1], self.updates(1)[0])
