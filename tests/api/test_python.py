"""Claims about `import silotune`: light, complete, and what it gives is what the command line gives."""

import contextlib
import doctest
import io
import json
import os
import subprocess
import sys
from importlib import import_module
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.errors import ColumnMissing, ExtraMissing, PlanInvalid, RunDirectoryInvalid
from silotune.plan.plan import Plan
from silotune.plan.written import plan_toml
from tests.api.workspace import SHORT, in_one_process

HEAVY = ("torch", "numpy", "pandas", "pydantic", "rich", "typer")


@pytest.fixture
def here(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return workspace


def command(*words):
    found = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_the_package_is_imported_without_any_library_and_names_all_that_it_gives():
    code = (
        "import sys, silotune; names = set(dir(silotune));"
        f"print(sorted(set({HEAVY}) & set(sys.modules)), set(silotune.__all__) <= names)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["[]", "True"]
    for name in silotune.__all__:
        assert getattr(silotune, name).__doc__ or name == "__version__"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = silotune.nothing


def documented():
    """Every module of the interface; each has docstrings with examples."""
    return sorted({f"silotune.{home}" for home in silotune._HOME.values()} - {"silotune.plan.plan"})


@pytest.mark.parametrize("name", documented())
def test_the_examples_of_docstrings_run_as_they_are_written(name, here):
    module = import_module(name)
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    out = io.StringIO()
    with in_one_process():
        for example in finder.find(module):
            runner.run(example, out=out.write)
    assert runner.failures == 0, out.getvalue()
    assert runner.tries > 1


def test_every_public_function_of_the_interface_has_an_example():
    told = {name: getattr(silotune, name).__doc__ or "" for name in silotune.__all__}
    assert {name for name, text in told.items() if ">>>" not in text} == EXAMPLED_ELSEWHERE


OBJECTS = {"Comparison", "EvaluatedModel", "ExportedAdapter", "Model", "Plan", "Tuned"}
EXAMPLED_ELSEWHERE = {*OBJECTS, "__version__", "resume"}
"""What examples of `compare`, `load` and `simulate` show, and what takes a killed run."""


def test_a_plan_of_python_runs_as_its_file_does(here):
    """Bit for bit: the run is seeded."""
    plan = Plan.load(here / "hospitals" / "plan.toml")
    assert Plan.load(_written(here, plan)) == plan
    sites = silotune.Site.all_in("hospitals")
    with in_one_process():
        run = silotune.simulate(plan, sites=sites, runs="from-python", progress=False)
    first, second = (
        (folder / "adapters" / "final" / "adapter_model.safetensors").read_bytes()
        for folder in (run.folder, here / "runs" / "small")
    )
    assert first == second
    assert run.plan == silotune.Run("runs/small").plan


def _written(folder, plan):
    path = folder / "written.toml"
    path.write_text(plan_toml(plan))
    return path


def test_a_plan_that_is_no_file_needs_to_be_told_the_sites(here):
    with pytest.raises(PlanInvalid, match="where the sites are"):
        silotune.simulate(Plan.load(here / "hospitals" / "plan.toml"))


def test_a_run_is_read_as_data_frames(here):
    run = silotune.Run("runs/small")
    rounds, sites, scores = run.rounds(), run.sites(), run.scores()
    assert list(rounds.index) == [1, 2, 3]
    assert rounds["epsilon"].is_monotonic_increasing
    assert rounds["trains"].tolist() == ["head", "adapter", "adapter"]
    assert set(sites.index) == {"alpha", "beta", "gamma"}
    assert sites["epsilon"].between(0, 8.0).all()
    told = json.loads(command("report", "runs/small", "--json"))
    by_key = {row["key"]: row for row in told["methods"]}
    assert scores["macro_f1"].to_dict() == {
        key: pytest.approx(row["test"]["macro_f1"]) for key, row in by_key.items()
    }
    assert "federated" in run._repr_html_()


def test_figures_are_matplotlibs_own_and_can_be_saved(here, tmp_path):
    figures = silotune.Run("runs/small").figures()
    assert all(isinstance(figure, Figure) for figure in figures.values())
    for name in ("learning", "epsilon"):
        figures[name].savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 4000


def test_predictions_are_those_of_the_command_line(here):
    texts = ["asthma of the left side 3", "cut of the right side"]
    model = silotune.load("runs/small", device="cpu")
    lines = command("predict", "runs/small", *texts, "--json", "--device", "cpu").splitlines()
    shares = [json.loads(line)["prediction"]["probabilities"] for line in lines]
    for found in (model.predict(texts), model.predict([{"text": text} for text in texts])):
        assert [dict(one.probabilities) for one in found] == shares
    frame = pd.DataFrame({"id": [7, 9], "text": texts}, index=[3, 4])
    shown = model.predict_frame(frame)
    assert list(shown.columns) == ["text", "output", "p(no)", "p(yes)"]
    assert list(shown.index) == [3, 4]
    np.testing.assert_allclose(shown[["p(no)", "p(yes)"]].sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("wrong", [[{"note": "x"}], [3.5], [{"text": None}]])
def test_an_example_without_its_role_is_refused_by_number_and_not_quoted(here, wrong):
    model = silotune.load("runs/small", device="cpu")
    with pytest.raises(ColumnMissing) as caught:
        model.predict(["fine", *wrong])
    assert "example 2" in str(caught.value)


def test_one_text_is_not_taken_for_a_list_of_letters(here):
    with pytest.raises(TypeError, match="list"):
        silotune.load("runs/small", device="cpu").predict("asthma")


def test_runs_are_compared_alike_in_python_and_at_the_command_line(here):
    found = silotune.compare("runs/small", "runs/other")
    told = json.loads(command("compare", "runs/small", "runs/other", "--json"))
    assert told["runs"] == list(found.rows)
    assert told["settings"] == {"privacy.epsilon": [8.0, 4.0]}
    frame = found.to_frame()
    assert list(frame.columns)[:1] == ["privacy.epsilon"]
    assert (frame["epsilon"] <= frame["privacy.epsilon"]).all()
    shown = command("compare", "runs/small", "runs/other")
    assert "privacy.epsilon" in shown
    assert isinstance(found.figure(), Figure)
    with pytest.raises(RunDirectoryInvalid, match="two"):
        silotune.compare("runs/small")


def test_without_pandas_the_extra_is_named(here, monkeypatch):
    run = silotune.Run("runs/small")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ExtraMissing) as caught:
        run.rounds()
    assert caught.value.remedy == "pip install 'silotune[notebook]'"


def test_a_notebook_shows_one_bar_over_the_rounds(here):
    told = io.StringIO()
    with in_one_process(), contextlib.redirect_stderr(told):
        silotune.simulate(
            "hospitals/plan.toml",
            runs="in-a-notebook",
            settings=SHORT,
            progress=Console(force_jupyter=True),
        )
    last = told.getvalue().replace("\r", "\n").strip().splitlines()[-1]
    assert "3/3" in last
    assert "macro-F1" in last
    assert "eps" in last


SCRIPT = """
import silotune
run = silotune.simulate(
    "hospitals/plan.toml", runs="by-script", workers=2, baselines=True, progress=False,
    settings={"rounds.number": 1, "optimizer.site.head_rounds": 0},
)
print(len(run.scores()))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_plain_script_may_simulate_with_baselines_and_needs_no_guard(here):
    """Its processes start without running the script again."""
    (here / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "script.py"], cwd=here, env=environment, timeout=500, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 3


def test_a_mapping_of_any_kind_is_an_example(here):
    model = silotune.load("runs/small", device="cpu")
    assert len(model.predict([MappingProxyType({"text": "cough"})])) == 1
