"""Two of seven sites send the opposite of what they learned, ten times over.

A softmax regression on made-up records, trained by the strategies themselves: one gradient sum a site
and round, every site another mixture of classes.
"""

from functools import cache

import numpy as np
import pytest

from silotune.models.layout import ArrayEntry, Layout
from silotune.plan.plan import Plan
from silotune.strategies import strategy_for
from silotune.strategies.base import Terms

CLASSES, INPUTS, SITES, RECORDS, ROUNDS = 3, 8, 7, 200, 40
LAYOUT = Layout((ArrayEntry("head.weight", (CLASSES, INPUTS), "head"),))
VOTE = {"weights": "equal"}
RULES = {
    "fedavg": {},
    "median": VOTE,
    "trimmed_mean": {**VOTE, "trim": 0.3},
    "multi_krum": {**VOTE, "byzantine": 2, "selected": 4},
    "geometric_median": VOTE,
    "norm_bound": {"bound": 0.05},
}


@cache
def records():
    """Features and labels of each site, and of a test set; sites differ in how often a class is."""
    rng = np.random.default_rng(0)
    centres = 1.6 * rng.normal(size=(CLASSES, INPUTS))

    def drawn(shares, n):
        labels = rng.choice(CLASSES, size=n, p=shares)
        return centres[labels] + rng.normal(size=(n, INPUTS)), labels

    sites = [drawn(rng.dirichlet([3.0] * CLASSES), RECORDS) for _ in range(SITES)]
    return sites, drawn(np.full(CLASSES, 1 / CLASSES), 3000)


def gradient_sum(weight, features, labels):
    logits = features @ weight.T
    logits -= logits.max(axis=1, keepdims=True)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return (shares - np.eye(CLASSES)[labels]).T @ features


def macro_f1(weight):
    features, labels = records()[1]
    said = (features @ weight.T).argmax(axis=1)
    scores = []
    for label in range(CLASSES):
        hit = ((said == label) & (labels == label)).sum()
        scores.append(2 * hit / max(1, (said == label).sum() + (labels == label).sum()))
    return np.mean(scores)


@cache
def trained(name, poisoned):
    raw = {
        "plan": {"name": "t", "purpose": "t", "seed": 1},
        "model": {"base": "x", "task": "text_classification", "labels": ["a", "b", "c"]},
        "data": {"dataset": "d", "test_share": 0.0, "validation_share": 0.0},
        "rounds": {"number": ROUNDS, "min_sites": SITES},
        "optimizer": {
            "server": {"name": "sgd", "momentum": 0.0},
            "site": {"head_lr": 0.5, "schedule": "constant", "warmup_share": 0.0},
        },
        "privacy": {"mode": "none", "rate": 1.0},
        "aggregation": {"strategy": name, **RULES[name]},
    }
    plan = Plan.from_mapping(raw)
    strategy = strategy_for(plan, layout=LAYOUT)
    terms = [Terms(node=i, site=f"s{i}", declared_units=RECORDS) for i in range(SITES)]
    strategy.cohort = {t.node: t for t in terms}
    adapter = np.zeros(LAYOUT.size, np.float32)
    for number in range(1, ROUNDS + 1):
        strategy.begin(number, adapter)
        for one, (features, labels) in zip(terms, records()[0], strict=True):
            update = gradient_sum(adapter.reshape(CLASSES, INPUTS), features, labels)
            if one.node < poisoned:
                update = -10 * update
            strategy.fold(one, update.ravel().astype(np.float32))
        adapter = strategy.finish(adapter, server_round=number)
    return macro_f1(adapter.reshape(CLASSES, INPUTS))


def test_all_rules_learn_from_honest_sites():
    assert all(trained(name, 0) > 0.85 for name in RULES)


def test_the_plain_mean_collapses():
    assert trained("fedavg", 2) < 0.4  # what is said at random scores a third


@pytest.mark.parametrize("name", sorted(set(RULES) - {"fedavg"}))
def test_each_robust_rule_stays_within_a_twentieth_of_its_clean_result(name):
    assert trained(name, 2) > trained(name, 0) - 0.05
