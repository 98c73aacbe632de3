"""Claims about `silotune export`: TensorBoard and MLflow read, with their own readers, what was told."""

import json
import sys
from collections import Counter

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from silotune.cli import app
from silotune.errors import ExportInTheWay, ExtraMissing, RunDirectoryInvalid
from silotune.export import of_directory
from silotune.rounds.run_directory import RunDirectory
from tests.server.monitored import office, tell_round
from tests.simulation.synthetic_run import Synthetic

__all__ = ["office"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return Synthetic(rounds=12).write(tmp_path_factory.mktemp("runs"))


def told(run_dir, kind):
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def export(run, tool, out, *more):
    found = CliRunner().invoke(
        app, ["export", str(run), "--to", tool, "--out", str(out), *more], catch_exceptions=True
    )
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


def tensorboard_curves(folder):
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    names = read.Tags()["scalars"]
    return read, {n: [(e.step, e.wall_time, e.value) for e in read.Scalars(n)] for n in names}


def mlflow_run(out, name):
    client = MlflowClient(tracking_uri=f"sqlite:///{out}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client, next(r for r in client.search_runs(experiments) if r.info.run_name == name)


def test_tensorboard_reads_what_the_events_told(run_dir, tmp_path):
    export(run_dir, "tensorboard", tmp_path)
    read, curves = tensorboard_curves(tmp_path / run_dir.name)
    scores = told(run_dir, "evaluated")
    shown = curves["simulator/validation/macro_f1"]
    assert [step for step, _, _ in shown] == [e["round"] for e in scores]
    assert [value for _, _, value in shown] == pytest.approx(
        [e["pooled"]["macro_f1"] for e in scores]
    )
    assert [time for _, time, _ in shown] == pytest.approx([e["time"] for e in scores])
    rounds = told(run_dir, "round_finished")
    assert [v for _, _, v in curves["round/bytes_up"]] == [e["bytes_up"] for e in rounds]
    for site, value in rounds[-1]["epsilon"].items():
        assert curves[f"epsilon/{site}"][-1][2] == pytest.approx(value)
    plan = read.Tensors("plan/text_summary")[0].tensor_proto.string_val[0].decode()
    resolved = json.loads((run_dir / "resolved.json").read_text())
    assert resolved["plan_sha256"] in plan
    assert "privacy.epsilon" in plan


@pytest.fixture(scope="module")
def mlflow_out(run_dir, tmp_path_factory):
    """A store with one run: making a store takes MLflow seconds."""
    out = tmp_path_factory.mktemp("mlflow")
    assert "mlflow ui" in export(run_dir, "mlflow", out)
    return out


def test_mlflow_reads_what_the_events_told(run_dir, mlflow_out):
    client, run = mlflow_run(mlflow_out, run_dir.name)
    scores = told(run_dir, "evaluated")
    history = client.get_metric_history(run.info.run_id, "simulator/validation/macro_f1")
    assert sorted((m.step, m.value) for m in history) == [
        (e["round"], e["pooled"]["macro_f1"]) for e in scores
    ]
    assert run.info.status == "FINISHED"
    assert run.info.start_time == round(1000 * told(run_dir, "run_started")[0]["time"])
    assert run.data.params["privacy.epsilon"] == "8.0"
    assert run.data.params["lora.r"] == "4"


def named(name, tmp_path, **facts):
    """A run directory of another name than those that are made in the same second."""
    folder = Synthetic(faults=False, **facts).write(tmp_path)
    return folder.rename(folder.with_name(name))


def test_names_that_mlflow_does_not_take_stay_apart(tmp_path, mlflow_out):
    sites = {"a&b": 100, "a,b": 200, "a_b": 300}
    folder = named("odd", tmp_path, sites=sites, rounds=4)
    export(folder, "mlflow", mlflow_out)
    _, run = mlflow_run(mlflow_out, folder.name)
    last = told(folder, "round_finished")[-1]["epsilon"]
    shown = {k: v for k, v in run.data.metrics.items() if k.startswith("epsilon/")}
    assert Counter(shown.values()) == Counter(last.values())


def test_a_round_that_was_begun_again_counts_once(tmp_path):
    folder = Synthetic(stop_after=3, faults=False).write(tmp_path)
    run = RunDirectory.open(folder)
    run.append_event("round_started", round=3, cohort=["x"], phase="head")
    run.append_event("round_finished", round=3, bytes_up=7)
    points = of_directory(folder).curves["round/bytes_up"]
    assert [p.round for p in points] == [1, 2, 3]
    assert points[-1].value == 7


def test_a_run_that_goes_on_is_exported_as_running(tmp_path, mlflow_out):
    export(named("going-on", tmp_path, stop_after=2), "mlflow", mlflow_out)
    assert mlflow_run(mlflow_out, "going-on")[1].info.status == "RUNNING"


def test_mlflow_refuses_a_second_export_of_a_run_and_keeps_the_first(run_dir, mlflow_out):
    before = mlflow_run(mlflow_out, run_dir.name)[1].data.metrics
    with pytest.raises(ExportInTheWay):
        export(run_dir, "mlflow", mlflow_out)
    assert mlflow_run(mlflow_out, run_dir.name)[1].data.metrics == before


def test_tensorboard_refuses_a_second_export_of_a_run_and_takes_another(tmp_path):
    first, second = (named(name, tmp_path / "runs", rounds=2) for name in ("one", "two"))
    for folder in (first, second):
        export(folder, "tensorboard", tmp_path / "out")
    with pytest.raises(ExportInTheWay):
        export(first, "tensorboard", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"one", "two"}


@pytest.mark.parametrize(
    ("tool", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")]
)
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    tool, module, run_dir, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExtraMissing) as caught:
        export(run_dir, tool, tmp_path / "out")
    assert caught.value.remedy == f"pip install 'silotune[{tool}]'"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirectoryInvalid):
        export(tmp_path, "tensorboard", tmp_path / "out")


def test_a_coordinators_run_is_exported_through_the_admin_api(office, tmp_path):
    record = office.told_run("exported-1", state="finished")
    for site in ("north", "south"):
        record.append_event("site_joined", site=site, declared_units=100, rate=0.1, sigma=1.0)
    for number in (1, 2, 3):
        tell_round(record, number, ["north", "south"], failed=["south"] if number == 2 else [])
        pooled = {"loss": 1.0 / number}
        record.append_event(
            "evaluated", round=number, view="released", split="validation", pooled=pooled
        )
    folder = office.credentials("exporter", "viewer")
    export("exported-1", "tensorboard", tmp_path, "--credentials", str(folder))
    _, curves = tensorboard_curves(tmp_path / "exported-1")
    shown = [(step, value) for step, _, value in curves["released/validation/loss"]]
    assert shown == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    # The accountant's epsilon grows with each round that arrived: south lost one.
    north, south = ([v for _, _, v in curves[f"epsilon/{s}"]] for s in ("north", "south"))
    assert north[0] < north[1] < north[2]
    assert south == pytest.approx([north[0], north[0], north[1]])
    assert not any(name.startswith("simulator") for name in curves)


def test_curves_are_what_is_exported_where_nothing_else_is_named(run_dir, tmp_path):
    words = [str(run_dir), "--to", "tensorboard", "--out"]
    for name, more in (("short", []), ("long", ["curves"])):
        found = CliRunner().invoke(app, ["export", *more, *words, str(tmp_path / name)])
        assert found.exit_code == 0, found.output
        assert list((tmp_path / name / run_dir.name).iterdir())
    shown = CliRunner().invoke(app, ["export", "--help"])
    assert {"curves", "adapter"} <= set(shown.output.split())
