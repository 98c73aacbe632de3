"""What `silotune simulate` and `silotune plan check` say of the sites' records and the plan."""

import csv
import json

import pytest
from typer.testing import CliRunner

from silotune.cli import app
from silotune.errors import RecordsChanged, TooFewRecords, UnitMismatch
from silotune.simulation import run
from tests.federation import write_federation
from tests.whole_run import in_this_process


@pytest.fixture
def federation(tmp_path, bert_folder):
    return write_federation(tmp_path, bert_folder)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    monkeypatch.setattr(run, "WorkerGrid", in_this_process)


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def rewrite(site, change):
    path = site.folder / "notes.csv"
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *change(rows)])


def relabel(rows):
    return [[text, "chronic" if label == "yes" else label, *rest] for text, label, *rest in rows]


PRIVATE = ("mode=record", "epsilon=8.0", "delta=1e-4", "clip=1.0")
SETS = [word for setting in PRIVATE for word in ("--set", f"privacy.{setting}")]


def simulated(federation, *words):
    runs = federation.folder / "runs"
    return invoke("simulate", federation.plan_path, "--runs", runs, "--workers", 1, *words)


def test_a_label_that_the_plan_lacks_is_told_with_site_count_and_label(federation):
    rewrite(federation.sites[0], relabel)
    checked = invoke("plan", "check", federation.plan_path)
    ran = simulated(federation, "--set", "rounds.number=1", "--set", "optimizer.site.head_rounds=1")
    assert checked.exit_code == ran.exit_code == 0, ran.output
    for result in (checked, ran):
        said = " ".join(result.output.split())
        assert "alpha leaves out column 'chronic': label is not one of model.labels in" in said
        assert "'chronic' (" in said
        assert "beta leaves out" not in said


def test_a_federation_without_any_fitting_record_is_refused_before_it_runs(federation):
    for site in federation.sites:
        rewrite(site, lambda rows: [[text, "other", *rest] for text, _, *rest in rows])
    result = simulated(federation)
    assert isinstance(result.exception, TooFewRecords)
    assert "'other' (60)" in " ".join(result.output.split())
    assert not (federation.folder / "runs").exists()


def test_another_unit_is_refused_by_both_names_and_only_where_it_matters(federation):
    unit = ("--set", "privacy.unit=patient", "--set", "privacy.max_records_per_unit=2")
    result = simulated(federation, *SETS, *unit)
    assert isinstance(result.exception, UnitMismatch)
    assert "by 'record', but privacy.unit of the plan is 'patient'" in result.exception.detail
    open_plan = ("--set", "rounds.number=1", "--set", "optimizer.site.head_rounds=1")
    assert simulated(federation, *unit, *open_plan).exit_code == 0


def test_a_run_does_not_go_on_with_other_records(federation, monkeypatch):
    monkeypatch.setattr(run, "_execute", lambda job, listener: job.directory)
    directory = run.simulate(
        federation.plan_path,
        runs=federation.folder / "runs",
        settings=run.Settings(workers=1),
        listener=lambda event: None,
    )
    path = directory.root
    run.resume(path, settings=run.Settings(workers=1), listener=lambda event: None)
    rewrite(federation.sites[1], lambda rows: rows[1:])
    result = invoke("simulate", "--resume", path)
    assert isinstance(result.exception, RecordsChanged)
    assert result.exception.detail == "the records of beta changed since the run began"
    (path / "records.json").unlink()  # a run of an older version
    notes = []
    run.resume(
        path, settings=run.Settings(workers=1), listener=lambda event: None, note=notes.append
    )
    assert "may have changed" in notes[0]


def test_look_alikes_across_the_split_are_told(federation):
    result = invoke("plan", "check", federation.plan_path)
    said = " ".join(result.output.split())
    assert said.count("are a training text again, or nearly") == 1  # of all sites in one sentence
    assert all(f"at {site.name}" in said for site in federation.sites)
    for site in federation.sites:
        rewrite(site, lambda rows: [[f"{'abcdefgh'[i % 8] * (1 + i // 8)}", *row[1:]]
                                    for i, row in enumerate(rows)])  # fmt: skip
    result = invoke("plan", "check", federation.plan_path)
    assert "are a training text again" not in " ".join(result.output.split())


def test_plan_check_replaces_settings_and_never_says_none_for_a_number(federation):
    words = ("plan", "check", federation.plan_path, "--sizes", "2000", *SETS, "--json")
    facts = json.loads(invoke(*words, "--set", "privacy.epsilon=3").output)
    assert facts["sites"]["site 1"]["epsilon"] == pytest.approx(3.0, abs=0.01)
    shown = invoke(*words[:-1], "--set", "privacy.delta=0.009").output
    assert "none" not in shown.splitlines()[-1]
    open_facts = json.loads(invoke(*words[:5], "--json").output)
    assert open_facts["sites"]["site 1"]["rate"] == 0.2  # the plan's own


def test_a_large_delta_is_told_and_refused_unless_the_policy_says_so(federation):
    config = federation.folder / "alpha" / "site.toml"
    for path in federation.folder.glob("*/site.toml"):
        text = path.read_text().replace("delta = 1e-3", "delta = 0.009")
        path.write_text(text.replace("declared_units = ", "declared_units = 1"))
    words = (*SETS, "--set", "privacy.delta=0.008")
    said = " ".join(invoke("plan", "check", federation.plan_path, *words).output.split())
    assert "delta 0.008 is at or above 1/160 at alpha" in said
    usual = (*SETS, "--set", "privacy.delta=0.001")
    said = " ".join(invoke("plan", "check", federation.plan_path, *usual).output.split())
    assert "delta 0.001 is above a tenth of 1/160 at alpha: 0.0006 or less is usual" in said
    result = simulated(federation, *words)
    assert "ST-519" in str(result.exception)
    assert config.exists()


def test_a_plan_without_min_sites_is_told_so(federation):
    text = federation.plan_path.read_text().replace("min_sites = 2\n", "")
    federation.plan_path.write_text(text)
    said = " ".join(invoke("plan", "check", federation.plan_path).output.split())
    assert "rounds.min_sites is not given, so a round counts with one site alone" in said
    federation.plan_path.write_text(text.replace("[rounds]", "[rounds]\nmin_sites = 1"))
    assert "min_sites is not given" not in invoke("plan", "check", federation.plan_path).output
