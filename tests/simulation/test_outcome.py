"""Claims about privacy.json: what it says of a person at two sites is what the noise allows."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from dp_accounting.dp_event import ComposedDpEvent, MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant

from silotune.plan.plan import Plan
from silotune.privacy.events import gaussian_event, step_event
from silotune.rounds.run_directory import RunDirectory
from silotune.simulation.outcome import AdapterScorer, _trivial, write_privacy
from tests.golden.make_certificate import PLAN
from tests.golden.material import DELTA

GOLDEN = Path(__file__).parents[1] / "golden" / "certificate.json"
ONE_ROUND = {**PLAN, "rounds": {"number": 1, "min_sites": 3}}


def certificates(**change):
    """The same certificate at two sites of a run of one round."""
    body = json.loads(GOLDEN.read_text())["certificate"] | change
    return {site: {"certificate": body} for site in ("north", "south")}


def privacy_of(tmp_path, plan, finished):
    directory = RunDirectory.create(tmp_path, "said", plan_toml="")
    write_privacy(directory, plan, finished)
    return directory.read_json("privacy.json")


def test_shared_noise_states_a_persons_epsilon_from_the_mixture(tmp_path):
    told = privacy_of(tmp_path, Plan.from_mapping(ONE_ROUND), certificates())
    q, sigma = 0.05, 0.9
    truth = PLDAccountant(value_discretization_interval=1e-3)  # the usual 1e-4 takes 20 s
    truth.compose(
        MixtureOfGaussiansDpEvent(sigma, [0, 1, 2], [(1 - q) ** 2, 2 * q * (1 - q), q**2])
    )
    truth.compose(gaussian_event(10.0), 2)  # each site's own noise on its metrics
    expected = truth.get_epsilon(DELTA)
    assert told["two_sites"]["epsilon"] == pytest.approx(expected, rel=2e-3)
    assert told["two_sites"]["delta"] == DELTA
    once = PLDAccountant().compose(
        ComposedDpEvent([step_event(rate=q, sigma=sigma, steps=1), gaussian_event(10.0)])
    )
    assert expected > 2 * once.get_epsilon(DELTA)  # the sum of both would be too little
    shown = float(told["statement"].rpartition("epsilon = ")[2].split()[0])
    assert told["two_sites"]["epsilon"] <= shown < expected + 0.02


def test_local_noise_adds_epsilons_and_deltas(tmp_path):
    privacy = {**PLAN["privacy"], "noise": "local"}
    plan = Plan.from_mapping({**ONE_ROUND, "privacy": privacy})
    told = privacy_of(tmp_path, plan, certificates(epsilon=3.0))
    assert told["two_sites"] == {"epsilon": 6.0, "delta": 2 * DELTA}
    assert "epsilon = 6.00 at delta = 2e-5" in told["statement"]


def test_a_language_model_is_scored_before_training_too():
    """An adapter of zeros is the base model as it came; its loss is the row to beat."""
    plan = causal_plan()
    asked = []

    class Looking:
        def score(self, adapter, **request):
            asked.append((adapter.tolist(), request["split"]))
            return {"alpha": {"counts": np.array([32.4, 10.0])}}

    store = SimpleNamespace(joined=["alpha"])
    base = AdapterScorer(plan, store=store, view=Looking()).base_counts(3)
    assert asked == [([0.0, 0.0, 0.0], "test")]
    (row,) = _trivial(plan, {"alpha": np.array([32.38, 10.0])}, base)
    assert row["title"] == "The base model as it came"
    assert row["test"]["loss"] == pytest.approx(3.24)


def causal_plan():
    return Plan.from_mapping(
        {
            "plan": {"name": "x", "purpose": "x"},
            "model": {"base": "x", "task": "causal_lm"},
            "data": {"dataset": "d"},
            "rounds": {"number": 2},
            "privacy": {"mode": "none", "rate": 0.1},
        }
    )
