"""Norm bounding: an update counts with at most the bound."""

import numpy as np
import pytest

from silotune.strategies.norm_bound import NormBound
from tests.strategies.contract import Streaming, cohort

BOUND = {"aggregation.strategy": "norm_bound", "aggregation.bound": 2.0}


class TestNormBound(Streaming):
    changes = {**BOUND, "rounds.local_steps": 4, "optimizer.server.name": "none"}

    def test_it_is_the_mean_of_shortened_changes(self):
        terms, updates, start = cohort(5), self.updates(5), self.start()
        updates[0] *= 0.01
        norms = [max(1.0, np.linalg.norm(np.float64(u)) / 2.0) for u in updates]
        weights = [t.declared_units for t in terms]
        short = [np.float64(u) / n for u, n in zip(updates, norms, strict=True)]
        want = start + np.average(short, axis=0, weights=weights)
        got = self.aggregate(terms, updates, adapter=start)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    def test_a_site_shortens_its_own_and_the_coordinator_changes_it_no_more(self):
        (update,) = self.updates(1)
        sent = NormBound.outgoing(self.plan, update * 100, declared_units=100)
        assert np.linalg.norm(np.float64(sent)) <= 2.0
        again = NormBound.outgoing(self.plan, sent, declared_units=100)
        assert again.tobytes() == sent.tobytes()

    def test_the_coordinator_shortens_what_a_lying_site_did_not_and_nothing_else(self):
        (terms,), (update,) = cohort(1), self.updates(1)
        start = np.zeros_like(self.start())
        honest = NormBound.outgoing(self.plan, update * 100, declared_units=100)
        for sent, most in ((update * 100, 2.0 * 1.001), (honest, 2.0)):
            got = self.aggregate([terms], [sent], adapter=start)
            assert np.linalg.norm(np.float64(got)) <= most
        np.testing.assert_allclose(got, honest, rtol=0, atol=1e-8)


class TestNormBoundInOneStep(Streaming):
    changes = BOUND
    sends_sums = True

    def test_the_bound_is_on_the_mean_gradient(self):
        (update,) = self.updates(1)
        batch = self.plan.expected_batch(1000)
        sent = NormBound.outgoing(self.plan, update * 1000, declared_units=1000)
        assert np.linalg.norm(np.float64(sent)) / batch == pytest.approx(2.0, rel=1e-5)
