"""Client-level privacy: what it costs, what noise it adds, and how the norm follows."""

import numpy as np
import pytest

from silotune.privacy.accounting import epsilon
from silotune.privacy.events import gaussian_event
from silotune.strategies import strategy_for
from silotune.strategies.site_privacy import SitePrivacy, marked, shortened
from tests.strategies.contract import StrategyContract, cohort, layout_for, plan_with

SITE = {
    "privacy.mode": "site",
    "privacy.epsilon": 8.0,
    "privacy.delta": 1e-5,
    "privacy.clip": 0.5,
    "privacy.site": {"noise": "coordinator"},
    "rounds.local_steps": 4,
    "optimizer.server.name": "none",
    "aggregation.weights": "equal",
}
ADAPTIVE = {**SITE, "privacy.site": {"noise": "coordinator", "quantile": 0.5, "clip_lr": 0.2}}


class TestFixedNorm(StrategyContract):
    changes = SITE


class TestAdaptiveNorm(StrategyContract):
    changes = ADAPTIVE


def test_all_rounds_together_cost_the_plans_epsilon():
    plan = plan_with(**SITE)
    sigma = SitePrivacy(plan).sigma
    spent = epsilon([gaussian_event(sigma)] * plan.rounds.number, delta=1e-5)
    assert 7.98 < spent <= 8.0


@pytest.mark.parametrize("sites", [7, 1000])
def test_the_count_of_adaptive_clipping_is_paid_from_the_same_budget(sites):
    """The mark of ±1/2 has sensitivity 1/2, so its multiplier is twice its noise."""
    plan = plan_with(**ADAPTIVE)
    spread, count = SitePrivacy(plan).multipliers(sites)
    events = [gaussian_event(spread), gaussian_event(2 * count)] * plan.rounds.number
    assert epsilon(events, delta=1e-5) <= 8.0 * (1 + 1e-6)
    assert spread > SitePrivacy(plan).sigma
    if sites == 1000:
        assert count == 50.0  # a twentieth of the cohort, as in the paper


def test_the_mean_has_noise_of_sigma_norms_over_the_cohort_once():
    plan = plan_with(**SITE)
    layout = layout_for(plan, inputs=300, outputs=300)
    strategy = strategy_for(plan, layout=layout)
    strategy.cohort = {t.node: t for t in cohort(5)}
    start = np.zeros(layout.size, np.float32)
    strategy.begin(1, start)
    for one in cohort(5):
        strategy.fold(one, start)
    noise = strategy.finish(start, server_round=1)
    want = SitePrivacy(plan).sigma * 0.5 / 5
    # 6 standard errors of a standard deviation: a false alarm in about 5e8 seeds; the seed is fixed.
    assert noise.std() == pytest.approx(want, rel=6 / np.sqrt(2 * layout.size))


def test_a_site_that_drops_out_does_not_change_the_divisor():
    """Who takes part is public; a divisor of those that answered would not be the plan's."""
    plan = plan_with(**SITE)
    layout = layout_for(plan)
    start = np.zeros(layout.size, np.float32)

    def run(answers):
        strategy = strategy_for(plan, layout=layout)
        strategy.cohort = {t.node: t for t in cohort(4)}
        strategy.begin(1, start)
        for one in cohort(answers):
            strategy.fold(one, np.full(layout.size, 0.01, np.float32))
        return strategy.finish(start, server_round=1)

    difference = run(4) - run(3)
    np.testing.assert_allclose(difference, 0.01 / 4, rtol=1e-3)


def test_the_norm_follows_the_quantile_of_the_sites_norms():
    plan = plan_with(**{**ADAPTIVE, "privacy.epsilon": 1e4, "privacy.clip": 20.0})
    layout, terms = layout_for(plan), cohort(101)
    strategy = strategy_for(plan, layout=layout)
    strategy.cohort = {t.node: t for t in terms}
    rng, start = np.random.default_rng(0), np.zeros(layout.size, np.float32)
    norms = rng.uniform(1, 3, size=101)
    for number in range(1, 60):
        strategy.begin(number, start)
        bound = strategy.settings()["clip"]
        for one, norm in zip(terms, norms, strict=True):
            update = rng.normal(size=layout.size)
            update *= norm / np.linalg.norm(update)
            strategy.fold(one, marked(update.astype(np.float32), bound))
        strategy.finish(start, server_round=number)
    assert strategy.settings()["clip"] == pytest.approx(np.median(norms), rel=0.1)


def test_a_mark_says_only_whether_the_update_was_short():
    update = np.array([3.0, 4.0], np.float32)
    assert marked(update, 5.0).tolist() == [3.0, 4.0, 0.5]
    long = marked(update, 1.0)
    assert long[-1] == -0.5
    assert np.linalg.norm(np.float64(long[:-1])) <= 1.0
    assert shortened(update, 10.0) is update


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"rounds.local_steps": 1, "optimizer.server.name": "adam"},
            "rounds.local_steps: at least 2",
        ),
        ({"aggregation.weights": "declared"}, "aggregation.weights: must be 'equal'"),
        ({"privacy.clip": {"head": 1.0, "adapter": 1.0}}, "privacy.clip: give one number"),
        ({"privacy.site": None}, "privacy.site: needed"),
        ({"privacy.site": {"noise": "site", "quantile": 0.5}}, "privacy.site.quantile"),
        ({"aggregation.strategy": "median"}, "compares the sites' updates"),
        ({"aggregation.strategy": "flexlora"}, "averages the products"),
        ({"aggregation.strategy": "scaffold", "optimizer.site.local": "sgd"}, "before clipping"),
        (
            {"aggregation.strategy": "norm_bound", "aggregation.bound": 1.0},
            "privacy.clip bounds the norms already",
        ),
        ({"privacy.mode": "record"}, "privacy.site: only when"),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_the_reason(changes, complaint):
    from silotune.errors import PlanInvalid

    with pytest.raises(PlanInvalid) as caught:
        plan_with(**{**SITE, **changes})
    assert complaint in str(caught.value)
