"""Statistics between real processes over TLS: proposed, approved, charged, counted, shown."""

import csv
import json

import pytest

from silotune.report.statistics import read
from tests.e2e.harness import cli

PLAN = """
[plan]
name = "before"
purpose = "What is there."
[model]
task = "statistics"
labels = ["no", "yes"]
[statistics]
floor = 30.0
[statistics.lengths]
edges = [7, 8]
[data]
dataset = "notes"
test_share = 0.0
validation_share = 0.0
[rounds]
number = 1
min_sites = 3
[privacy]
mode = "record"
epsilon = 4.0
delta = 1e-4
clip = 1.0
rate = 1.0
noise = "shared"
[aggregation]
secure = true
cohort = 3
threshold = 3
"""
FAR = 7.0  # deviations of the noise; a figure is further from the truth once in 3e11


@pytest.fixture
def counting(federation):
    """Sites whose policies allow statistics, and nothing else."""
    made = federation()
    made.allow("statistics")
    made.plan_path.write_text(PLAN)
    return made.up()


def true_labels(made):
    found = {"no": 0, "yes": 0}
    for site in made.sites.values():
        with (site.folder / "notes.csv").open() as file:
            for row in csv.DictReader(file):
                found[row["chronic"]] += 1
    return found


@pytest.mark.slow
def test_a_deployed_run_of_statistics_tells_the_truth_but_for_its_noise(counting, tmp_path):
    run = counting.propose()
    counting.coordinator.wait_finished(run)
    path = tmp_path / "statistics.json"
    shown = counting.coordinator.cli("runs", "statistics", run, "--out", path)
    found = read(path)
    assert shown == found
    assert set(found["sites"]) == set(counting.sites)
    true = true_labels(counting)
    assert found["units"]["value"] == pytest.approx(240, abs=FAR * found["noise"])
    for label in found["labels"]:
        share = label["share"]["value"] * 240
        assert share == pytest.approx(true[label["label"]], abs=2 * FAR * found["noise"])
    assert counting.charges(run) == {name: [1] for name in counting.sites}
    said = cli("coordinator", "runs", "statistics", run, "--dir", counting.coordinator.folder)
    assert "records together" in said.stdout
    assert "a group is shown from 30 records on" in " ".join(said.stdout.split())

    words = ("runs", "adapter", run, "--out", tmp_path, "--dir", counting.coordinator.folder)
    refused = cli("coordinator", *words, check=False)
    assert refused.returncode != 0  # the bare sums would tell what lies below the floor
    assert "adapter.safetensors" in refused.stderr + refused.stdout
    (plan,) = json.loads(counting.sites["alpha"].site("plans", "--all", "--json").stdout)["plans"]
    told = dict(plan["words"])["Statistics"]
    assert "how often each label occurs (no, yes)" in told
    assert "No text, no model and no record leaves." in told
