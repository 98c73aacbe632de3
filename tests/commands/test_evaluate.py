"""`silotune evaluate` by its command: figures beside scikit-learn's, on records whose truth is known."""

import csv
import json
import stat

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score

from silotune.inference.evaluated import ModelEvaluation
from tests.commands.terminal import shown
from tests.commands.test_predict import finished
from tests.models.model_material import TEXTS

LABELS = ("no", "yes", "perhaps")


@pytest.fixture(scope="module")
def run(tmp_path_factory, bert_folder):
    return finished(tmp_path_factory.mktemp("runs"), bert_folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory, bert_folder):
    return finished(tmp_path_factory.mktemp("runs"), bert_folder, seed=6)


@pytest.fixture(scope="module")
def asked():
    rng = np.random.default_rng(2)
    return [
        {
            "text": f"{TEXTS[rng.integers(len(TEXTS))]} {'eye ' * rng.integers(0, 5)}".strip(),
            "label": LABELS[rng.integers(3)],
            "who": f"p{number // 3}",
            "ward": "small" if number < 12 else "east" if number % 3 else "west",
        }
        for number in range(180)
    ]


@pytest.fixture(scope="module")
def answered(run, asked):
    told = shown("json", "predict", str(run), *(record["text"] for record in asked))
    found = [json.loads(line)["prediction"] for line in told.text.splitlines()]
    return np.array([[one["probabilities"][label] for label in LABELS] for one in found])


@pytest.fixture
def data(tmp_path, asked):
    path = tmp_path / "new.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asked[0]))
        writer.writeheader()
        writer.writerows(asked)
    return path


def evaluated(run, data, *words):
    told = shown("json", "evaluate", str(run), "--data", str(data), "--draws", "100", *words)
    assert told.code == 0, told.errors
    return ModelEvaluation.model_validate_json(told.text)


def test_figures_are_scikit_learns_of_the_answers_of_predict(run, data, asked, answered):
    found = evaluated(run, data, "--unit", "who")
    truth = [LABELS.index(record["label"]) for record in asked]
    said = answered.argmax(1)
    assert (found.records, found.units) == (180, 60)
    assert found.metrics["accuracy"].value == pytest.approx(accuracy_score(truth, said))
    macro = f1_score(truth, said, average="macro", labels=sorted(set(truth)), zero_division=0)
    assert found.metrics["macro_f1"].value == pytest.approx(macro)
    assert np.array_equal(found.confusion, confusion_matrix(truth, said, labels=range(3)))
    for place, row in enumerate(found.labels):
        area = roc_auc_score(np.array(truth) == place, answered[:, place])
        assert row.auroc.value == pytest.approx(area, abs=2e-3)
        assert row.auroc.low < row.auroc.value < row.auroc.high


def test_choices_are_made_on_units_that_are_not_scored(run, data, asked, answered):
    found = evaluated(run, data, "--unit", "who", "--positive", "yes")
    parts = found.threshold.parts
    assert parts.chosen_on == parts.scored_on == 90 and parts == found.temperature.parts
    names = sorted({record["who"] for record in asked})
    order = np.random.default_rng(0).permutation(len(names))
    choosing = {names[at] for at in order[:30]}
    rows = [at for at, record in enumerate(asked) if record["who"] not in choosing]
    said = answered[rows, LABELS.index("yes")] >= found.threshold.value - 1e-6
    truth = np.array([asked[at]["label"] == "yes" for at in rows])
    sensitivity = (said & truth).sum() / truth.sum()
    assert found.threshold.figures["sensitivity"].value == pytest.approx(sensitivity, abs=0.04)


def test_a_unit_that_is_scored_chooses_nothing_whatever_it_is_called(run, asked, tmp_path):
    """A record without a unit is called after its row; a unit may be called like that, too."""
    paths = {"scored.csv": asked[:90], "choosing.csv": asked[45:]}
    for name, records in paths.items():
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "who"])
            writer.writerows([one["text"], one["label"], f"row {one['who']}"] for one in records)
    words = ("--unit", "who", "--choose-on", str(tmp_path / "choosing.csv"))
    parts = evaluated(run, tmp_path / "scored.csv", *words).temperature.parts
    assert (parts.chosen_on, parts.scored_on) == (90, 90)


def test_the_order_of_records_decides_nothing(run, data, asked, tmp_path):
    lines = data.read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.csv"
    turned.write_text(lines[0] + "".join(reversed(lines[1:])))
    one, two = (evaluated(run, path, "--unit", "who") for path in (data, turned))
    assert one.temperature.value == pytest.approx(two.temperature.value, rel=1e-3)
    assert one.confusion == two.confusion


def test_small_groups_are_hidden_and_not_to_be_worked_out(run, data):
    found = evaluated(run, data, "--unit", "who", "--group", "ward").groups
    assert {row.group for row in found.shown} < {"east", "west"} and found.hidden == 2
    assert "small" not in json.dumps(found.model_dump(mode="json")["shown"])


def test_two_models_are_compared_on_the_same_records(run, other, data, asked, answered):
    found = evaluated(run, data, "--against", str(other), "--positive", "no").comparison
    theirs = evaluated(other, data)
    assert found.metrics["accuracy"].value == pytest.approx(theirs.metrics["accuracy"].value)
    ours = evaluated(run, data).metrics["accuracy"].value
    assert found.differences["accuracy"].value == pytest.approx(
        ours - theirs.metrics["accuracy"].value
    )
    assert found.mcnemar.only_this - found.mcnemar.only_other == pytest.approx(
        180 * found.differences["accuracy"].value
    )
    assert found.delong.other == pytest.approx(theirs.labels[LABELS.index("no")].auroc.value)


def test_what_is_kept_is_the_owners_and_the_temperature_this_models(
    run, other, data, asked, tmp_path
):
    folder = tmp_path / "kept"
    found = evaluated(run, data, "--out", str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    kept = json.loads((folder / "evaluation.json").read_text())
    assert ModelEvaluation.model_validate(kept) == found
    words = ["--temperature", str(folder / "temperature.json"), asked[0]["text"]]
    cooled = shown("json", "predict", str(run), *words).facts["prediction"]
    plain = shown("json", "predict", str(run), asked[0]["text"]).facts["prediction"]
    powers = {k: v ** (1 / found.temperature.value) for k, v in plain["probabilities"].items()}
    expected = {label: power / sum(powers.values()) for label, power in powers.items()}
    assert cooled["label"] == plain["label"]
    assert cooled["probabilities"] == pytest.approx(expected, abs=1e-4)
    refused = shown("plain", "predict", str(other), *words)
    assert refused.code == 60 and "ST-661" in refused.errors


def test_the_page_and_the_terminal_quote_no_record_and_say_whose_they_are(run, data, tmp_path):
    data.write_text(
        data.read_text() + "secret illness,,p1,east\nsecret thing,secretlabel,p2,east\n"
    )
    folder = tmp_path / "kept"
    told = shown(
        "terminal", "evaluate", str(run), "--data", str(data), "--draws", "100",
        "--unit", "who", "--group", "ward", "--out", str(folder),
    )  # fmt: skip
    page = (folder / "evaluation.html").read_text()
    assert told.code == 0
    for text in (told.text, page):
        flat = " ".join(text.split())
        assert "secret" not in flat and "own people" in flat
        assert "row 182" in flat and "row 183" in flat
    assert "<script" not in page and 'aria-label="Reliability' in page


@pytest.mark.parametrize(
    "settings", [{"model__labels": ["no", "yes"]}, {"model__multi_label": True}]
)
def test_a_model_that_answers_something_else_is_not_compared(
    run, data, tmp_path, bert_folder, settings
):
    odd = finished(tmp_path, bert_folder, **settings)
    told = shown("plain", "evaluate", str(run), "--data", str(data), "--against", str(odd))
    assert told.code == 30 and "other labels" in told.errors


def test_other_tasks_have_their_own_metrics(tmp_path, llama_folder):
    run = finished(tmp_path, llama_folder, "causal_lm")
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": t, "response": f"chronic {t}"}) + "\n" for t in TEXTS)
    )
    found = evaluated(run, path)
    loss = found.metrics["loss"]
    assert loss.low < loss.value < loss.high and not found.labels
    assert found.metrics["perplexity"].value == pytest.approx(np.exp(loss.value))
    same = evaluated(run, path, "--against", str(run)).comparison
    assert same.differences["loss"].value == 0 and same.mcnemar is None
