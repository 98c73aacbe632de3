"""Whole simulations: what they leave, what they time, what they say of privacy."""

import json
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModel

from silotune.privacy import certificate
from tests.commands.terminal import shown
from tests.federation import SITES, write_federation
from tests.whole_run import final, play


def test_a_run_leaves_everything_that_is_promised(whole):
    directory, seen = whole
    assert seen == directory.events.read()
    assert directory.adapter_rounds() == [1, 2, 3, 4, 5]
    for name in ("plan.toml", "resolved.json", "privacy.json", "results.json"):
        assert (directory.root / name).is_file()
    assert len(directory.metrics.read()) == 5
    resolved = directory.read_json("resolved.json")
    assert resolved["plan_sha256"] and resolved["versions"]["flwr"] == version("flwr")


def test_training_and_everything_else_are_timed_apart(whole):
    facts = whole[0].read_json("timings.json")
    assert set(facts["train_seconds"]) == set(SITES)
    assert all(set(by_round) == set("12345") for by_round in facts["train_seconds"].values())
    assert 0 < facts["busiest_worker_seconds"] < facts["rounds_seconds"]
    longest = max(sum(by_round.values()) for by_round in facts["train_seconds"].values())
    assert facts["busiest_worker_seconds"] >= longest


def test_nothing_of_the_records_is_left_in_the_run_directory(whole):
    assert not (whole[0].root / "scratch").exists()


def test_a_seeded_run_says_that_it_is_not_private(whole):
    privacy = whole[0].read_json("privacy.json")
    assert privacy["private"] is False
    assert privacy["statement"] == "seeded: not private"
    body = certificate.verify(whole[0].site("alpha") / "certificate.json").body
    assert body.private is False


def test_epsilon_of_every_site_is_the_plans_and_grows_by_round(whole):
    for facts in whole[0].read_json("privacy.json")["sites"].values():
        assert facts["epsilon"] == pytest.approx(8.0, rel=1e-3)
        assert facts["epsilon"] <= 8.0
        curve = [epsilon for _, epsilon in facts["epsilon_by_round"]]
        assert curve == sorted(curve)
        assert curve[-1] == pytest.approx(facts["epsilon"], rel=1e-6)


def test_the_baselines_are_scored_on_the_same_records(whole):
    methods = {m["key"]: m for m in whole[0].read_json("results.json")["methods"]}
    trained = {"federated", "own", "pooled", "probe_federated", "probe_pooled", "personal"}
    assert set(methods) == {*trained, "majority"}
    sizes = [{site: row["n"] for site, row in m["by_site"].items()} for m in methods.values()]
    assert all(size == sizes[0] for size in sizes)
    used = {key: m["examples_seen"] for key, m in methods.items() if key in trained}
    # Poisson samples of the same rate over the same records: about 160 records times 5 steps.
    assert max(used.values()) < 1.5 * min(used.values())


def test_what_needs_no_training_is_scored_on_the_very_same_records(whole):
    found = whole[0].read_json("results.json")
    methods = {m["key"]: m for m in found["methods"]}
    sizes = {site: row["n"] for site, row in methods["federated"]["by_site"].items()}
    counts = {
        label: sum(sizes[site] * shares[label] for site, shares in found["labels"].items())
        for label in ("no", "yes")
    }
    most = max(counts, key=counts.get)
    assert methods["majority"]["title"] == f"Always “{most}”"
    accuracy = methods["majority"]["test"]["accuracy"]
    assert accuracy == pytest.approx(counts[most] / sum(counts.values()))
    assert methods["majority"]["recall"] == {"no": most == "no", "yes": most == "yes"}
    for site, row in methods["majority"]["by_site"].items():
        assert row["accuracy"] == pytest.approx(max(found["labels"][site].values()))


def test_models_of_ones_own_are_scored_on_everybodys_records_too(whole):
    methods = {m["key"]: m for m in whole[0].read_json("results.json")["methods"]}
    for key in ("own", "personal"):
        scores = [methods[key]["everywhere"][site]["macro_f1"] for site in SITES]
        assert methods[key]["test"]["macro_f1"] == pytest.approx(sum(scores) / 3)
        assert set(methods[key]["by_site"]) == set(SITES)


def test_the_simulators_curve_is_marked_as_its_own_view(whole):
    evaluated = [e for e in whole[0].events if e["event"] == "evaluated"]
    assert {e["view"] for e in evaluated} == {"simulator"}
    assert [(e["round"], e["split"]) for e in evaluated] == [
        (2, "validation"),
        (4, "validation"),
        (5, "validation"),
        (5, "test"),
    ]


def test_the_final_adapter_loads_with_plain_peft(whole, bert_folder):
    model = PeftModel.from_pretrained(
        AutoModel.from_pretrained(bert_folder), whole[0].final_adapter
    )
    live = dict(model.named_parameters())
    saved = load_file(whole[0].adapter_of_round(5))
    for name, array in saved.items():
        if "lora" in name:
            loaded = live[name.replace(".weight", ".default.weight")].detach().numpy()
            np.testing.assert_array_equal(loaded, array)


def test_without_a_seed_the_run_is_private_and_differs_each_time(federation, whole):
    directory = play(federation, "secure", **{"plan.seed": None})
    privacy = directory.read_json("privacy.json")
    assert privacy["private"] is True
    assert certificate.verify(directory.site("beta") / "certificate.json").body.private
    assert final(directory) != final(whole[0])


def test_released_metrics_are_marked_released(federation):
    directory = play(federation, "metrics", **{"privacy.metrics_share": 0.2})
    released = [e for e in directory.events if e.get("view") == "released"]
    assert [e["round"] for e in released] == [2, 4]
    assert all(set(e["pooled"]) <= {"accuracy", "macro_f1"} for e in released)
    assert directory.read_json("privacy.json")["sites"]["alpha"]["epsilon"] <= 8.0


def test_patients_are_protected_as_units(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder, patients=True)
    changes = {"privacy.unit": "patient", "privacy.max_records_per_unit": 2}
    directory = play(federation, "patients", **changes)
    body = certificate.verify(directory.site("alpha") / "certificate.json").body
    assert body.unit == "patient"
    assert "patient" in body.adjacency_in_words


def test_cli_simulate_report_and_predict_work_together(federation, tmp_path):
    """The simulation in processes that start from nothing, as a person has it; the others need none."""
    words = ("simulate", str(federation.plan_path), "--runs", str(tmp_path), "--json")
    run = subprocess.run(
        [
            *(sys.executable, "-c", "from silotune.cli import main; main()"),
            *(*words, "--workers", "1", "--set", "rounds.number=3"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    folder = json.loads(run.stdout)["run_directory"]
    assert shown("plain", "report", folder).text.strip().endswith("report.html")
    predicted = shown("json", "predict", folder, "asthma of the left side")
    prediction = predicted.facts["prediction"]
    assert prediction["label"] in {"no", "yes"}
    assert sum(prediction["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    refused = shown("plain", "simulate", str(federation.plan_path), "--set", "privacy.epsilom=3")
    assert refused.code == 10
    assert "ST-102" in refused.errors
    assert "did you mean" in refused.errors
    assert "Traceback" not in refused.errors
