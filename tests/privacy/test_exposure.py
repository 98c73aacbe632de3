"""Claims about exposures: other sites' noise is counted only where it really protects.

Every combination of strategy, head and noise that a secure plan may have is attacked as its certificate
says nobody can: by a coordinator that sees sums over the cohort and colludes with nobody.
"""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from silotune.client.terms import run_events
from silotune.errors import PlanInvalid
from silotune.plan.plan import Plan
from silotune.plan.strategies import STRATEGIES
from silotune.privacy import certificate
from silotune.privacy.accounting import calibrate
from silotune.privacy.tally import tally_of
from silotune.strategies import method_of

SITES, UNITS, ROUNDS, DELTA = 9, 1000, 2, 1e-5
TRIALS = 8_000
WRONG = 1e-6  # chance that an honest certificate fails, for each combination
OPTIONS = {
    "trimmed_mean": {"trim": 1},
    "multi_krum": {"byzantine": 0, "selected": 1},
    "norm_bound": {"bound": 0.05},
}


def secure_plan(strategy, head, noise):
    """The plan of a combination whose other settings let the other sites' noise count."""
    return Plan.from_mapping(
        {
            "plan": {"name": "exposed", "purpose": "test"},
            "model": {"base": "x", "task": "text_classification", "labels": ["a", "b"]},
            "data": {"dataset": "notes"},
            "rounds": {"number": ROUNDS, "min_sites": SITES, "local_steps": 1},
            "privacy": {
                "mode": "record",
                "epsilon": 8.0,
                "delta": DELTA,
                "clip": 1.0,
                "rate": 0.5,
                "noise": noise,
            },
            "optimizer": {"site": {"head_rounds": 0}},
            "aggregation": {
                "strategy": strategy,
                "head": head,
                "secure": True,
                "cohort": SITES,
                "threshold": SITES,
                "weights": "declared",
                **OPTIONS.get(strategy, {}),
            },
        }
    )


def accepted():
    for strategy, head, noise in product(STRATEGIES, ("shared", "local"), ("local", "shared")):
        try:
            yield strategy, head, noise, secure_plan(strategy, head, noise)
        except PlanInvalid:
            continue


CASES = list(accepted())


def sigma_of(plan):
    return calibrate(epsilon=8.0, delta=DELTA, rate=0.5, steps=ROUNDS)


def test_the_combinations_are_those_of_the_plan():
    names = {(strategy, head, noise) for strategy, head, noise, _ in CASES}
    assert ("fedsa", "shared", "local") in names
    assert ("fedavg", "local", "local") in names
    assert ("norm_bound", "shared", "local") in names
    assert {s for s, _, noise in names if noise == "shared"} == {
        "fedavg",
        "ffa",
        "rolora",
        "fedsvd",
    }


def claims(tally, plan):
    """Epsilon by number of colluding sites."""
    found = certificate.exposures(tally, delta=DELTA, sums=certificate.sums_of(plan))
    return {exposure.colluding: exposure.epsilon for exposure in found}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:3]))
def test_no_certificate_claims_less_than_a_coordinator_can_see(case):
    """False alarm: below 1e-6 for each combination (Clopper and Pearson, each side half)."""
    plan = case[-1]
    sigma = sigma_of(plan)
    tally = tally_of(run_events(plan, UNITS, sigma=sigma)[0])
    rows = claims(tally, plan)
    claimed = rows.get(0, rows[certificate.ALL_OTHERS])
    rng = np.random.default_rng(7)
    present = seen_by_the_coordinator(plan, sigma, rng, present=True)
    absent = seen_by_the_coordinator(plan, sigma, rng, present=False)
    assert lower_bound(present, absent) <= claimed


def test_the_attack_wins_where_the_claim_is_the_noise_of_a_sum():
    """The attack is sharp: it refutes, for each that keeps or changes, what a plain sum may claim."""
    fedavg = secure_plan("fedavg", "shared", "local")
    tally = tally_of(run_events(fedavg, UNITS, sigma=sigma_of(fedavg))[0])
    claimed = claims(tally, fedavg)[0]
    for strategy, head in (("fedsa", "shared"), ("fedavg", "local"), ("norm_bound", "shared")):
        plan = secure_plan(strategy, head, "local")
        sigma, rng = sigma_of(plan), np.random.default_rng(7)
        present = seen_by_the_coordinator(plan, sigma, rng, present=True)
        absent = seen_by_the_coordinator(plan, sigma, rng, present=False)
        assert lower_bound(present, absent) > claimed, strategy


def seen_by_the_coordinator(plan, sigma, rng, *, present):
    """Log-likelihood-like score of each trial, from the sums of all rounds.

    One number stands for the direction in which the unit pushes, another for everything else. The other
    sites' clipped sums are long, and known to the coordinator; with the site's own next gradients it
    reads, clearly, what the site kept from the round before.
    """
    method = method_of(plan)
    shared = plan.privacy.noise == "shared"
    each = sigma / np.sqrt(SITES) if shared else sigma
    kept = bool(method.trained(plan, 1) & method.kept(plan)) or bool(
        method.trained(plan, 1) - method.sent(plan, 1)
    )
    score = np.zeros(TRIALS)
    for _ in range(ROUNDS):
        drawn = (rng.random(TRIALS) < plan.privacy.rate) & present
        mine = np.stack([drawn + rng.normal(0, each, TRIALS), np.zeros(TRIALS)], axis=1)
        others = np.stack(
            [
                rng.normal(0, each, (SITES - 1, TRIALS)),
                np.full((SITES - 1, TRIALS), plan.privacy.rate * UNITS),
            ],
            axis=2,
        )
        if kept:  # what stays has the site's own noise, and the next round's sum shows it
            seen, spread = mine[:, 0], each
        else:
            mine = outgoing(method, plan, mine)
            others = np.stack([outgoing(method, plan, site) for site in others])
            scale = others[:, :, 1].mean() / (plan.privacy.rate * UNITS)
            seen = mine[:, 0] + others[:, :, 0].sum(axis=0)
            spread = each * np.sqrt(1 + (SITES - 1) * scale**2)
        likelihood = np.exp((2 * seen - 1) / (2 * spread**2))
        score += np.log1p(plan.privacy.rate * (likelihood - 1))
    return score


def outgoing(method, plan, updates):
    return np.stack([method.outgoing(plan, one, declared_units=UNITS) for one in updates])


def lower_bound(present, absent):
    """Epsilon that the best threshold shows, with all chances of error in `WRONG`."""
    cuts = np.quantile(np.concatenate([present, absent]), np.linspace(0.001, 0.999, 200))
    level = WRONG / (2 * 2 * len(cuts))
    best = 0.0
    for cut in cuts:
        above, falsely = (present > cut).sum(), (absent > cut).sum()
        for hits, alarms in ((above, falsely), (TRIALS - falsely, TRIALS - above)):
            true = stats.beta.ppf(level, hits, TRIALS - hits + 1) if hits else 0.0
            false = stats.beta.ppf(1 - level, alarms + 1, TRIALS - alarms)
            if true > DELTA:
                best = max(best, float(np.log((true - DELTA) / false)))
    return best
