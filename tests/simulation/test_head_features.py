"""Random cosines by their user's path: secure shared noise, a mean at the end, resume, predict."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from silotune import cli
from silotune.client import model_cache
from tests.commands.commanded import SECURED
from tests.federation import CHOICES, SITES, write_federation
from tests.whole_run import play

COSINES = {"kind": "cosines", "number": 40, "scale": 1.5}
SETTINGS = {
    **SECURED["shared"],
    "model.head_features": COSINES,
    "model.centre_texts": ["cough", "gout", "left", "right side"],
    "optimizer.server.name": "sgd",
    "optimizer.server.average": "ema",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, bert_folder):
    federation = write_federation(tmp_path_factory.mktemp("cosines"), bert_folder)
    return federation, play(federation, "runs", **SETTINGS)


def test_the_layout_and_the_bytes_of_a_round_have_their_width(run):
    arrays = run[1].load_adapter(5)
    assert arrays["head.weight"].shape == (2, 40)
    assert any(arrays["head.weight"].ravel())
    rounds = [event for event in run[1].events if event["event"] == "round_finished"]
    assert [event["round"] for event in rounds] == [1, 2, 3, 4, 5]
    # Two head-only rounds: 82 numbers of four bytes from each of three sites, and what masks them.
    assert 3 * 82 * 4 <= rounds[0]["bytes_up"] < rounds[2]["bytes_up"]


def test_they_cost_no_epsilon(run):
    """Every site is charged for its rounds, as without them."""
    facts = run[1].read_json("privacy.json")["sites"]
    assert set(facts) == set(SITES)
    assert all(site["epsilon"] == pytest.approx(8.0, rel=1e-3) for site in facts.values())


def test_the_run_ends_with_a_mean_and_saves_it(run):
    last = run[1].load_adapter(5)
    saved = load_file(run[1].final_adapter / "head.safetensors")
    np.testing.assert_array_equal(saved["head.weight"], last["head.weight"])
    assert saved["frequencies"].shape == (40, 32)


def test_predict_answers_with_them(run):
    said = CliRunner().invoke(cli.app, ["predict", str(run[1].root), "gout", "--json"])
    assert said.exit_code == 0, said.output
    (line,) = said.output.splitlines()
    assert set(json.loads(line)["prediction"]["probabilities"]) == {"no", "yes"}


def test_the_report_names_them(run):
    said = CliRunner().invoke(cli.app, ["report", str(run[1].root)])
    assert said.exit_code == 0, said.output
    assert "40 fixed random cosines" in (run[1].root / "report.html").read_text()


def test_what_the_base_model_makes_of_a_record_serves_plans_with_and_without_them(
    tmp_path, bert_folder, monkeypatch
):
    """The cosines come behind it: a search over plans, and a comparison, encode each text once."""
    federation, made = write_federation(tmp_path, bert_folder), []
    real = model_cache.compute_frozen
    monkeypatch.setattr(
        model_cache, "compute_frozen", lambda *a, **k: (made.append(a), real(*a, **k))[1]
    )
    models = model_cache.ModelCache(CHOICES)
    texts = SETTINGS["model.centre_texts"]
    for number, features in enumerate((None, COSINES, {**COSINES, "number": 20})):
        plan = federation.plan.override(
            {"model.head_features": features, "model.centre_texts": texts}
        )
        part = federation.runs(plan, state=str(number), models=models)[0]
        part.training.prepare()
        assert part.training.trainer.frozen.features.shape[1] == 32
    assert len(made) == 1
    plan = plan.override({"model.feature_scale": 2.0})
    federation.runs(plan, state="scaled", models=models)[0].training.prepare()
    assert len(made) == 2  # the scale is in it
