"""FedSVD: the mean of B, then orthonormal factors of the same product."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.models.layout import pairs
from silotune.strategies.fedsvd import refactor
from tests.strategies.contract import Streaming, cohort
from tests.strategies.merged import whole

FEDSVD = {"aggregation.strategy": "fedsvd"}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.floats(0, 3))
def test_new_factors_make_the_same_product_with_orthonormal_rows(seed, rank, size):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(rank, 9)), size * rng.normal(size=(6, rank))
    turned, core, turn = refactor(A, B)
    np.testing.assert_allclose(core @ turned, B @ A, atol=1e-10)
    np.testing.assert_allclose(turned @ turned.T, np.eye(rank), atol=1e-10)
    np.testing.assert_allclose(turn @ A, turned, atol=1e-8)
    norms = np.linalg.norm(core, axis=0)
    assert (np.diff(norms) <= 1e-9).all()


def test_they_are_those_of_the_svd_of_the_product():
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(3, 9)), rng.normal(size=(6, 3))
    turned, core, _ = refactor(A, B)
    U, S, Vt = np.linalg.svd(B @ A)
    np.testing.assert_allclose(np.abs(turned), np.abs(Vt[:3]), atol=1e-10)
    np.testing.assert_allclose(np.abs(core), np.abs(U[:, :3] * S[:3]), atol=1e-10)


class TestRefactored(Streaming):
    changes = {**FEDSVD, "rounds.local_steps": 4, "optimizer.server.name": "none"}

    def test_it_is_the_svd_of_the_product_with_the_mean_of_b(self):
        terms, updates, start = cohort(5), self.updates(5), self.start()
        (before,) = pairs(self.layout(), start)
        weights = [t.declared_units for t in terms]
        mean = np.average(np.float64(updates), axis=0, weights=weights)
        B = before.B + mean[:12].reshape(6, 2)
        U, S, Vt = np.linalg.svd(B @ before.A)
        (after,) = pairs(self.layout(), self.aggregate(terms, updates, adapter=start))
        np.testing.assert_allclose(np.abs(after.A), np.abs(Vt[:2]), atol=1e-5)
        np.testing.assert_allclose(np.abs(after.B), np.abs(U[:, :2] * S[:2]), atol=1e-5)

    def test_one_site_alone_keeps_its_merged_weight(self):
        (update,) = self.updates(1)
        start, layout = self.start(), self.layout()
        own = start + layout.spread(layout.spans({"B", "head"}), update)
        out = self.aggregate(cohort(1), [update], adapter=start)
        np.testing.assert_allclose(whole(self, out), whole(self, own), atol=1e-5)
        np.testing.assert_allclose(out[-10:], own[-10:], rtol=1e-6)

    def test_before_b_has_left_zero_a_becomes_orthonormal_all_the_same(self):
        start, layout = self.start(), self.layout()
        for span in layout.spans({"B"}):
            start[span.start : span.stop] = 0
        nothing = np.zeros_like(self.updates(1)[0])
        (after,) = pairs(layout, self.aggregate(cohort(1), [nothing], adapter=start))
        np.testing.assert_allclose(after.A @ after.A.T, np.eye(2), atol=1e-6)
        assert not after.B.any()


class TestRefactoredInOneStep(Streaming):
    changes = {**FEDSVD, "optimizer.server.name": "sgd", "optimizer.server.momentum": 0.9}
    sends_sums = True

    def test_momentum_is_turned_with_the_factors(self):
        """G_B = G_W A^T: in the new coordinates the momentum of the same G_W's is another matrix."""
        terms = cohort(1)
        strategy, adapter = self.fresh(terms), self.start()
        rng = np.random.default_rng(2)
        total = np.zeros((6, 9))
        for number in (1, 2, 3):
            (pair,) = pairs(self.layout(), adapter)
            gradient = rng.normal(size=(6, 9))
            total = 0.9 * total + gradient
            batch = self.plan.expected_batch(terms[0].declared_units)
            sums = batch * np.concatenate([(gradient @ pair.A.T).ravel(), np.zeros(10)])
            strategy.begin(number, adapter)
            strategy.fold(terms[0], sums.astype(np.float32))
            adapter = strategy.finish(adapter, server_round=number)
        (after,) = pairs(self.layout(), adapter)
        (first,) = pairs(self.layout(), strategy.optimizer.first)
        np.testing.assert_allclose(first.B, total @ after.A.T, rtol=1e-3, atol=1e-4)

    def test_second_moments_stay_positive(self):
        strategy = self.fresh(cohort(1))
        for number in (1, 2, 3):
            self.aggregate(cohort(1), self.updates(1, seed=number), strategy=strategy)
        assert (strategy.optimizer.second >= 0).all()
