"""Plans with correlated noise: what they need, and weights that dense linear algebra finds best, too."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from silotune.errors import PlanInvalid
from silotune.plan.bands import band_weights, growth, noise_in_adapters
from silotune.plan.plan import Plan, plan_in_words
from tests.plan.test_left_out import REQUIRED, read

BANDED = {
    **REQUIRED,
    "rounds": {"number": 72},
    "optimizer": {"server": {"name": "sgd"}},
    "privacy": {**REQUIRED["privacy"], "rate": 0.06, "bands": 8},
}


def plan_with(**changes):
    return Plan.from_mapping(BANDED).override(changes)


def recursion(plan):
    """The server's SGD with momentum, step by step: adapters as a matrix times the rounds' sums."""
    rounds, momentum = plan.rounds.number, plan.optimizer.server.momentum
    adapter, direction = np.zeros(rounds), np.zeros(rounds)
    rows = []
    for step in range(rounds):
        direction = momentum * direction
        direction[step] += 1.0
        rate = plan.optimizer.site.factor(step=step, steps=rounds)
        adapter = adapter + rate * direction
        rows.append(adapter)
    return np.array(rows)


def toeplitz(weights, size):
    return sum(c * np.eye(size, k=-k) for k, c in enumerate(weights))


def left(plan, weights):
    """Root mean square of the noise in the adapters, dense, where the column norm scales the noise."""
    size = plan.rounds.number
    spread = recursion(plan) @ np.linalg.inv(toeplitz(weights, size))
    return np.linalg.norm(weights) * np.linalg.norm(spread) / math.sqrt(size)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_noise_in_the_adapters_is_that_of_the_servers_own_recursion(momentum, schedule):
    plan = plan_with(**{"optimizer.server.momentum": momentum, "optimizer.site.schedule": schedule})
    weights = (1.0, 0.6, 0.3, -0.1)
    ratio = left(plan, weights) / left(plan, (1.0,))
    assert noise_in_adapters(plan, weights) == pytest.approx(ratio, rel=1e-9)


@pytest.mark.parametrize(
    ("rounds", "bands", "momentum"), [(72, 8, 0.9), (40, 3, 0.0), (12, 12, 0.5)]
)
def test_no_search_without_slopes_finds_better_weights(rounds, bands, momentum):
    changes = {"rounds.number": rounds, "privacy.bands": bands, "privacy.rate": 0.01}
    plan = plan_with(**changes, **{"optimizer.server.momentum": momentum})
    weights, why = band_weights(plan)
    found = left(plan, weights)
    assert "least mean square" in why
    assert len(weights) == bands and weights[0] == 1.0
    other = minimize(
        lambda free: left(plan, (1.0, *free)), np.array(weights[1:]), method="Nelder-Mead"
    )
    assert found <= other.fun * (1 + 1e-5)
    assert found < 0.9 * left(plan, (1.0,))


def test_a_plan_that_names_bands_gets_weights_and_one_that_has_them_keeps_them(tmp_path):
    plan = read(tmp_path, BANDED)
    assert plan.privacy.band_weights == band_weights(plan)[0]
    given = read(tmp_path, BANDED, **{"privacy.band_weights": [1.0, 0.5]})
    assert given.privacy.band_weights == (1.0, 0.5)


@pytest.mark.parametrize("strategy", ["fedavg", "ffa"])
def test_no_rule_fills_in_rounds_that_train_something_else(tmp_path, strategy):
    tables = {**BANDED, "aggregation": {"strategy": strategy}, "lora": {"r": 4}}
    plan = read(tmp_path, tables)
    assert plan.optimizer.site.head_rounds == 72
    assert len(plan.privacy.band_weights) == 8


def test_correlated_noise_may_be_shared():
    secure = {"secure": True, "cohort": 5, "threshold": 4}
    plan = plan_with(**{"privacy.noise": "shared", "aggregation": secure})
    assert "each takes back a part" in dict(plan_in_words(plan))["Privacy"]


def test_a_plan_without_bands_has_the_text_that_it_had():
    plain = plan_with(**{"privacy.bands": None})
    assert plain.canonical() == plan_with(**{"privacy.bands": 1}).canonical()
    assert "band" not in plain.canonical()


REFUSED = [
    ({"privacy.bands": 17}, "privacy.rate: at most 1 / bands"),
    (
        {"privacy.bands": 73, "privacy.rate": 0.001},
        "privacy.bands: expected less than or equal to 64",
    ),
    ({"rounds.number": 7}, "privacy.bands: at most rounds.number = 7"),
    ({"rounds.local_steps": 2}, "rounds.local_steps: must be 1 with privacy.bands"),
    ({"optimizer.server.name": "adam"}, "optimizer.server.name: must be 'sgd'"),
    ({"optimizer.site.head_rounds": 30}, "optimizer.site.head_rounds: 0, or all 72"),
    ({"aggregation.strategy": "rolora"}, "aggregation.strategy: 'fedavg' or 'ffa'"),
    ({"aggregation.strategy": "fedsvd"}, "aggregation.strategy: 'fedavg' or 'ffa'"),
    ({"aggregation.strategy": "norm_bound", "aggregation.bound": 1.0}, "aggregation.strategy"),
    ({"aggregation.strategy": "median", "aggregation.weights": "equal"}, "aggregation.strategy"),
    ({"aggregation.head": "local"}, "aggregation.strategy: 'fedavg' or 'ffa'"),
    (
        {"privacy": {"mode": "none", "rate": 0.06, "bands": 8}},
        "privacy.mode: must be 'record' with privacy.bands",
    ),
    ({"privacy.band_weights": [0.5, 0.5]}, "privacy.band_weights: the first must be 1"),
    ({"privacy.band_weights": [1.0] * 9}, "privacy.band_weights: at most privacy.bands = 8"),
    (
        {"privacy.band_weights": [1.0, -2.0]},
        "privacy.band_weights: the noise of a round would grow",
    ),
    (
        {"privacy.band_weights": [1.0, 1e200]},
        "privacy.band_weights: the noise of a round would grow",
    ),
    ({"privacy.bands": 1, "privacy.band_weights": [1.0]}, "privacy.band_weights: only with"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_correlated_noise_cannot_go_with_is_refused_with_its_key(changes, said):
    with pytest.raises(PlanInvalid) as refused:
        plan_with(**changes)
    assert said in str(refused.value)


def test_not_a_number_is_no_weight():
    with pytest.raises(PlanInvalid, match=r"band_weights\.1: expected a finite number"):
        plan_with(**{"privacy.band_weights": [1.0, math.nan]})


def test_growth_is_that_of_the_inverse():
    weights = (1.0, 0.9, 0.7, 0.2)
    inverse = np.linalg.inv(toeplitz(weights, 50))
    assert growth(weights, 50) == pytest.approx(np.linalg.norm(inverse[-1]), rel=1e-12)
    assert math.isinf(growth((1.0, -1.5), 100_000))


def test_the_officer_reads_what_correlation_means():
    said = dict(plan_in_words(plan_with()))["Privacy"]
    assert "Noise is correlated over 8 rounds" in said
    assert "can be drawn in one of any 8 rounds in a row only" in said
    assert "charged once for all of them" in said
    two = dict(plan_in_words(plan_with(**{"privacy.bands": 2})))["Privacy"]
    assert "takes back a part of what the one before it added" in two
    assert "correlated" not in dict(plan_in_words(plan_with(**{"privacy.bands": 1})))["Privacy"]
