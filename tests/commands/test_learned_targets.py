"""Several labels, numbers and pairs by the command line: from the look at records to an answer."""

import json

import pytest
from typer.testing import CliRunner

from silotune import cli
from tests.commands.commanded import newest, words
from tests.federation import PRIVATE, write_federation
from tests.task_sites import CASES, retell

CHARGED = {
    **PRIVATE,
    "rounds.number": 2,
    "rounds.evaluate_every": 1,
    "optimizer.site.head_rounds": 1,
    "privacy.metrics_share": 0.3,
}


def a_federation(folder, base, case):
    """The notes of `write_federation`, with other columns beside them and another task."""
    made = write_federation(folder, base)
    retell(folder, case)
    text = made.plan_path.read_text()
    old = 'task = "text_classification"\nlabels = ["no", "yes"]'
    assert old in text
    made.plan_path.write_text(text.replace(old, case["model"]))
    return made


def said(*given, code=0):
    found = CliRunner().invoke(cli.app, [str(word) for word in given])
    assert found.exit_code == code, found.output
    return found.output


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_from_the_records_to_an_answer(tmp_path, bert_folder, name):
    case = CASES[name]
    made = a_federation(tmp_path, bert_folder, case)
    site = made.sites[0]
    looked = json.loads(said("data", "check", site.file, "--plan", made.plan_path, "--json"))
    assert looked["datasets"][0]["labels"] if "datasets" in looked else looked["labels"]
    told = said("plan", "check", made.plan_path)
    assert "tuned to" in told
    said(*words(made, **CHARGED), "--baselines")
    run = newest(made)
    results = run.read_json("results.json")
    for method in results["methods"]:
        assert {*method["test"]} <= case["metrics"], method["key"]
    keys = [method["key"] for method in results["methods"]]
    assert keys[:2] == ["federated", "majority"]
    assert {"pooled", "own", "personal", "probe_federated"} <= {*keys}
    released = [e for e in run.events if e.get("view") == "released"]
    assert released, "the sites' own counts, with noise"
    report = (run.root / "report.html").read_text()
    assert case["first"] in report
    shown = said("predict", run.root, *case["ask"], "--json").splitlines()
    answer = json.loads(shown[0])["prediction"]
    assert len(shown) == 1
    if name == "number":
        assert 0.0 <= answer <= 30.0
    else:
        assert [*answer["probabilities"]] == ["no", "yes"]
        assert isinstance(answer["labels" if name == "several" else "label"], list | str)


def test_a_pair_takes_two_texts_and_says_so(tmp_path, bert_folder):
    from tests.commands.test_predict import finished

    run = finished(tmp_path, bert_folder, "pair_classification")
    assert "give 2 texts" in said("predict", run, "one alone", code=2)
    told = said("predict", run, "a", "b", "c", "d")
    assert len(told.splitlines()) == 2


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        (["--labels=a,b", "--multi-label"], "multi_label = true"),
        (
            ["--task=text_regression", "--range=0,30"],
            "target = { lower = 0.0, upper = 30.0 }",
        ),
        (["--task=pair_classification", "--labels=a,b"], 'task = "pair_classification"'),
    ],
)
def test_a_plan_is_drafted_for_them(tmp_path, asked, written):
    path = tmp_path / "plan.toml"
    said("plan", "new", path, "--yes", "--dataset=notes", "--units=900", *asked)
    assert written in path.read_text()
    assert "tuned to" in said("plan", "check", path, "--sizes=900,900,900")
