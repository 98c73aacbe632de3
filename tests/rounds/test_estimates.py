"""What is made of noisy sums: intervals that hold as often as they say, and nothing below the floor."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from silotune.models.layout import statistics_layout
from silotune.plan.counted import part_scale
from silotune.plan.plan import Plan
from silotune.rounds.estimates import NOISE_FLOOR, QUANTILES, find

LABELS = ["common", "rare", "absent", "one"]
PLAN = Plan.from_mapping(
    {
        "plan": {"name": "s", "purpose": "tests"},
        "model": {"task": "statistics", "labels": LABELS},
        "data": {"dataset": "d", "test_share": 0.0, "validation_share": 0.0},
        "rounds": {"number": 1},
        "privacy": {
            "mode": "record", "unit": "patient", "epsilon": 1.0, "delta": 1e-5,
            "clip": 1.0, "rate": 1.0,
        },
        "statistics": {
            "records_a_unit": [2, 3, 6],
            "lengths": {"edges": [4, 8, 16, 32]},
            "numbers": {"age": {"lower": 0.0, "upper": 120.0, "edges": [18, 40, 65, 80]}},
        },
    }
)  # fmt: skip
UNITS, MEAN = 5_000.0, 0.2
TRUE = {
    "units": [UNITS],
    "labels": [4_700.0, 299.0, 0.0, 1.0],
    "records_a_unit": [3_000.0, 1_000.0, 700.0, 300.0],
    "lengths": [500.0, 1_500.0, 2_000.0, 900.0, 100.0],
    "numbers.age.histogram": [400.0, 1_100.0, 1_500.0, 800.0, 200.0],
    "numbers.age.mean": [4_000.0 * MEAN / math.sqrt(2.0), 4_000.0 / math.sqrt(2.0)],
}
SIGMA = 4.0  # of a unit's whole vector, as a run at epsilon 1 has
RUNS = 1_500
_ALARM = 1e-6  # of each of the assertions about a share of RUNS


def told(true=TRUE, *, noise=0.0, rng=None, plan=PLAN):
    layout, scale = statistics_layout(plan), part_scale(plan)
    flat = np.concatenate([true[entry.name] for entry in layout.entries]) * scale
    if rng is not None:
        flat = flat + rng.normal(0.0, noise, flat.size)
    declared = {"alpha": 3000, "beta": 2000}
    variance = noise**2
    return find(
        plan, flat.astype(np.float32), variance=variance, sites=("alpha", "beta"), declared=declared
    )


@pytest.fixture(scope="module")
def many():
    rng = np.random.default_rng(7)
    return [told(noise=SIGMA, rng=rng) for _ in range(RUNS)]


def covered(estimates, truth):
    """How many intervals hold the truth; one that is not shown says nothing wrong."""
    return sum(e is None or e["low"] <= truth <= e["high"] for e in estimates)


FIGURES = {
    "units": (lambda f: f["units"], UNITS),
    "a common label": (lambda f: f["labels"][0]["share"], 4_700 / UNITS),
    "a rare label": (lambda f: f["labels"][1]["share"], 299 / UNITS),
    "units of two records": (lambda f: f["records_a_unit"]["bins"][1]["share"], 0.2),
    "long texts": (lambda f: f["lengths"]["bins"][4]["share"], 100 / UNITS),
    "a mean": (lambda f: f["numbers"]["age"]["mean"], 60.0 + 60.0 * MEAN),
    "who has a number": (lambda f: f["numbers"]["age"]["units"], 4_000.0),
}


@pytest.mark.parametrize("name", FIGURES)
def test_an_interval_holds_as_often_as_it_says_and_no_oftener(many, name):
    """Two exact binomial tails, each a false alarm once in a million."""
    pick, truth = FIGURES[name]
    found = [pick(run) for run in many]
    held = covered(found, truth)
    assert binom.cdf(held, RUNS, 0.95) > _ALARM
    assert binom.sf(held - 1, RUNS, 0.95) > _ALARM
    middle = np.mean([e["value"] for e in found])
    spread = np.std([e["value"] for e in found]) / math.sqrt(RUNS)
    assert abs(middle - truth) < 6.0 * spread + 1e-9  # false alarm: 2e-9


@pytest.mark.parametrize("place", range(len(QUANTILES)))
def test_the_interval_of_a_quantile_holds_at_least_as_often(many, place):
    counts = np.array(TRUE["numbers.age.histogram"])
    at = int(np.searchsorted(np.cumsum(counts) / counts.sum(), QUANTILES[place]))
    ends = [0.0, 18.0, 40.0, 65.0, 80.0, 120.0]
    rows = [run["numbers"]["age"]["quantiles"][place] for run in many]
    # The true one is somewhere in its group, so the interval must have all of that.
    held = sum(row["low"] <= ends[at] and row["high"] >= ends[at + 1] for row in rows)
    assert binom.cdf(held, RUNS, 0.95) > _ALARM
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)


def test_a_group_of_nobody_or_one_is_hardly_ever_shown(many):
    """Noise alone passes two of its deviations in 2.3 % of runs."""
    for place in (2, 3):
        shown = sum(run["labels"][place]["share"] is not None for run in many)
        assert binom.sf(shown - 1, RUNS, 0.03) > _ALARM


def test_the_floor_is_the_plans_or_that_of_the_noise_whichever_is_higher():
    deviation = 2.0 * SIGMA / part_scale(PLAN)
    assert told(noise=2.0 * SIGMA)["floor"] == pytest.approx(NOISE_FLOOR * deviation)
    high = PLAN.override({"statistics.floor": 1_000.0})
    assert told(noise=SIGMA, plan=high)["floor"] == 1_000.0


def test_what_is_below_the_floor_is_not_in_what_is_told():
    plan = PLAN.override({"statistics.floor": 250.0})
    found = told(plan=plan, noise=1e-6)
    assert [row["share"] is not None for row in found["labels"]] == [True, True, False, False]
    assert found["lengths"]["bins"][4]["share"] is None
    assert found["records_a_unit"]["bins"][3]["share"]["value"] == pytest.approx(0.06, abs=1e-4)
    nobody = told({name: [0.0] * len(part) for name, part in TRUE.items()}, noise=SIGMA)
    assert nobody["units"] is None
    assert all(row["share"] is None for row in nobody["labels"])
    assert nobody["numbers"]["age"]["mean"] is None
    for part in (nobody["lengths"], nobody["records_a_unit"], nobody["numbers"]["age"]):
        assert all(row["value"] is None for row in part["quantiles"])


def test_without_noise_the_figures_are_the_truth():
    found = told()
    whole, part = found["units"], found["lengths"]["bins"][2]
    assert [*whole.values()] == pytest.approx([UNITS] * 3)
    assert (part["from"], part["to"]) == (8.0, 15.0)
    assert [*part["share"].values()] == pytest.approx([0.4] * 3, abs=1e-5)
    half = next(row for row in found["numbers"]["age"]["quantiles"] if row["q"] == 0.5)
    assert half["value"] == pytest.approx(40.0 + 25.0 * (2_000 - 1_500) / 1_500, abs=1e-2)
    assert (half["low"], half["high"]) == (40.0, 65.0)


def test_figures_stay_where_figures_can_be():
    """Whatever the noise: shares from 0 to 1, quantiles that rise, means within their bounds."""
    rng = np.random.default_rng(3)
    small = {name: [v / 100.0 for v in part] for name, part in TRUE.items()}
    for _ in range(200):
        found = told(small, noise=SIGMA, rng=rng)
        shares = [row["share"] for row in (*found["labels"], *found["lengths"]["bins"])]
        for share in filter(None, shares):
            assert 0.0 <= share["low"] <= share["value"] <= share["high"] <= 1.0
        for rows in (found["lengths"]["quantiles"], found["numbers"]["age"]["quantiles"]):
            values = [row["value"] for row in rows if row["value"] is not None]
            assert values == sorted(values)
        if mean := found["numbers"]["age"]["mean"]:
            assert 0.0 <= mean["low"] <= mean["value"] <= mean["high"] <= 120.0
