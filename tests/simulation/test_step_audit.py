"""One audited step through the real engine, gate, ledger and aggregation."""

import numpy as np
import pytest

from silotune.client import updates
from silotune.plan.sections import Clip
from silotune.privacy.attacks.bounds import audit_step
from silotune.privacy.engine import ClipGroup
from silotune.simulation.step_audit import step_plan, step_scores
from tests.federation import PRIVATE, write_federation

ONE_STEP = {
    **PRIVATE,
    "privacy.delta": 1e-5,
    "privacy.rate": 1.0,
    "rounds.number": 1,
    "rounds.evaluate_every": 0,
    "optimizer.site.head_rounds": 0,
}
SECURE = {
    "aggregation.secure": True,
    "aggregation.cohort": 3,
    "aggregation.threshold": 3,
    "rounds.min_sites": 3,
}
SHARED = {**SECURE, "privacy.noise": "shared"}
# The training adds the noise itself where it goes on from noisy sums.
SEVERAL = {"rounds.local_steps": 3}
LOCAL_HEAD = {"aggregation.head": "local"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("audited"), bert_folder)


def found(federation, settings, *, canaries=2000):
    plan = federation.plan.override(settings)
    seen = step_scores(plan, federation.sites, canaries=canaries, seed=1)
    delta = plan.privacy.delta or 1e-5
    return seen, audit_step(seen.scores, seen.coins, claimed=seen.claimed, mu=seen.mu, delta=delta)


def halve_the_noise(monkeypatch):
    """Wherever a site adds any: to the sums beside its ledger, and between a trainer's own steps."""
    group, missing = ClipGroup.noise_std, updates.missing_noise
    monkeypatch.setattr(ClipGroup, "noise_std", lambda own, sigma: group(own, sigma / 2))
    monkeypatch.setattr(
        updates,
        "missing_noise",
        lambda plan, parts, *, sigma: missing(plan, parts, sigma=sigma / 2),
    )


@pytest.mark.parametrize(("claimed", "least"), [(2.0, 0.8), (8.0, 3.0)])
def test_a_claimed_epsilon_has_a_sharp_lower_bound(federation, claimed, least):
    _, finding = found(federation, {**ONE_STEP, "privacy.epsilon": claimed}, canaries=10_000)
    assert finding.claimed == pytest.approx(claimed, rel=1e-3)
    assert least < finding.lower_bound < finding.independent < claimed
    assert not finding.violated


@pytest.mark.parametrize("claimed", [2.0, 8.0])
@pytest.mark.parametrize(
    "mode", [{}, SHARED, SEVERAL, LOCAL_HEAD], ids=["local", "shared", "several", "local head"]
)
def test_half_the_noise_is_seen_as_a_violation(federation, monkeypatch, claimed, mode):
    halve_the_noise(monkeypatch)
    # The noise's own check compares with the same wrong number, and sees nothing.
    settings = {**ONE_STEP, **mode, "privacy.epsilon": claimed}
    # A step of several has a third of the budget: its smaller claim takes more canaries to refute.
    _, finding = found(federation, settings, canaries=10_000 if mode == SEVERAL else 2000)
    assert finding.violated
    assert finding.independent > finding.claimed
    if mode != SEVERAL:
        assert finding.claimed == pytest.approx(claimed, rel=1e-3)


def test_without_privacy_the_attack_wins(federation):
    seen, finding = found(federation, {})
    assert finding.claimed is None
    assert finding.lower_bound > 8
    assert (seen.scores[seen.coins].min()) > seen.scores[~seen.coins].max()


# Each number is a mean over some 1,000 canaries: off by 0.15 with a probability below 1e-5.
@pytest.mark.parametrize(
    "settings",
    [
        ONE_STEP,
        {**ONE_STEP, "privacy.clip": 0.5},
        {**ONE_STEP, "privacy.clip": {"head": 0.3, "adapter": 2.0, "head_share": 0.2}},
        {**ONE_STEP, "plan.seed": None},
        {**ONE_STEP, **SECURE},
        {**ONE_STEP, **SHARED},
        {**ONE_STEP, **SHARED, "aggregation.encoding": "uint16"},
        {**ONE_STEP, **SEVERAL},
        {**ONE_STEP, **SEVERAL, "privacy.clip": 0.5},
        {**ONE_STEP, **SEVERAL, **SECURE},
        {**ONE_STEP, **SEVERAL, **SECURE, "aggregation.encoding": "uint16"},
        {**ONE_STEP, **LOCAL_HEAD},
    ],
)
def test_scores_are_where_the_claim_says(federation, settings):
    seen, finding = found(federation, settings)
    inside, outside = seen.scores[seen.coins], seen.scores[~seen.coins]
    assert np.mean(inside) == pytest.approx(seen.mu, abs=0.15)
    assert np.mean(outside) == pytest.approx(0.0, abs=0.15)
    assert np.std(inside) == pytest.approx(1.0, abs=0.12)
    assert np.std(outside) == pytest.approx(1.0, abs=0.12)
    assert not finding.violated


def test_the_step_of_a_long_plan_has_the_noise_of_that_plan(federation):
    settings = {**PRIVATE, "rounds.number": 50, "privacy.metrics_share": 0.1}
    plan = federation.plan.override(settings)
    step = step_plan(plan, federation.sites)
    assert step.privacy.clip == plan.privacy.clip == Clip(head=1.0, adapter=1.0)
    _, finding = found(federation, settings)
    assert finding.claimed == pytest.approx(step.privacy.epsilon, rel=1e-3)
    assert not finding.violated
