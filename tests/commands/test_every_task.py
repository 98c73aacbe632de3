"""`predict --data` and `evaluate` by the command line, of every task that a plan can name.

The cases are the table of tasks itself: a new task is in them, and fails until somebody says what its
figures are compared with.
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy.stats import spearmanr
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    mean_absolute_error,
    precision_score,
    r2_score,
    recall_score,
    roc_auc_score,
)

from silotune.data.columns import LISTS
from silotune.inference.evaluated import ModelEvaluation
from silotune.models.tasks import get_task
from silotune.plan.tasks import SEVERAL, TASKS
from silotune.rounds.trained import find_trained
from tests.commands.terminal import shown
from tests.commands.test_predict import finished
from tests.image_material import write_image_model, write_scans
from tests.models.model_material import CORPUS

RECORDS = 32
CASES = {
    **{name: (name, {}) for name in TASKS},
    **{f"{name}, several labels": (name, {"model__multi_label": True}) for name in SEVERAL},
    "class weights": ("text_classification", {"model__class_weights": {"yes": 3.0}}),
    "chats": (
        "causal_lm",
        {
            "model__chat": {"template": {"user": "Q: {content}\n", "assistant": "A: {content}\n"}},
            "data__max_length": 60,
        },
    ),
}


@dataclass(frozen=True)
class Case:
    run: object
    plan: object
    data: object
    records: list
    answers: list
    found: ModelEvaluation = field(repr=False)

    @property
    def labels(self):
        return self.plan.model.labels

    def truths(self):
        return [record[self.plan.task.target] for record in self.records]

    def outputs(self):
        return [answer["prediction"] for answer in self.answers]

    def shares(self):
        return np.array([[a["probabilities"][n] for n in self.labels] for a in self.answers])


@pytest.fixture(scope="module")
def bases(tmp_path_factory, bert_folder, llama_folder):
    image = write_image_model(tmp_path_factory.mktemp("vit"), "vit")
    return {"encoder": bert_folder, "decoder": llama_folder, "image": image}


def the_examples(plan, folder):
    """Labelled records as a task's own public examples, in the form that JSON lines have."""
    rng = random.Random(4)
    names = write_scans(folder, RECORDS) if plan.task.sees else []
    found = []
    for number in range(RECORDS):
        text = " ".join(rng.sample(rng.choice(CORPUS).split(), 3))
        record = dict(get_task(plan).example(text, number=number, plan=plan))
        if names:
            record["image"] = names[number]
        lists = LISTS & set(record)
        found.append({k: json.loads(v) if k in lists else v for k, v in record.items()})
    return found


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, bases):
    task, settings = CASES[request.param]
    folder = tmp_path_factory.mktemp("task")
    run = finished(folder, bases[TASKS[task].base], task, **settings)
    plan = find_trained(run).plan
    records = the_examples(plan, folder)
    data = written(folder / "records.jsonl", records)
    told = shown("json", "predict", str(run), "--data", str(data), "--out", str(folder / "a.jsonl"))
    assert told.code == 0, told.errors
    answers = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    target = plan.task.target
    if target and not plan.task.generates:  # so that half of them are right
        for number in range(0, RECORDS, 2):
            records[number][target] = answers[number]["prediction"]
    records = [{**record, "who": f"p{number // 2}"} for number, record in enumerate(records)]
    written(data, records)
    words = ["--data", str(data), "--unit", "who", "--draws", "100"]
    told = shown("json", "evaluate", str(run), *words, "--out", str(folder / "kept"))
    assert told.code == 0, told.errors
    found = ModelEvaluation.model_validate_json(told.text)
    return Case(run, plan, data, records, answers, found)


def test_every_record_is_answered(case):
    assert len(case.answers) == RECORDS
    assert all({*answer} >= {*case.plan.task.reads, "prediction"} for answer in case.answers)
    if case.plan.task.has_labels and not case.plan.task.each_token:
        assert all([*answer["probabilities"]] == [*case.labels] for answer in case.answers)


def test_figures_are_those_of_known_libraries_on_these_answers(case):
    found = {name: figure.value for name, figure in case.found.metrics.items()}
    for row in case.found.labels:
        for name in case.found.told_of_labels:
            found[f"{name}/{row.label}"] = getattr(row, name).value
    expected = KNOWN[case.plan.task.counts](case)
    assert {*expected} == {name for name, value in found.items() if value is not None}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=2e-3), name


def test_it_has_the_metrics_of_its_task_with_intervals_over_units(case):
    assert case.found.units == RECORDS // 2 and case.found.unit_column == "who"
    for metric in case.plan.task.metrics:
        figure = case.found.metrics[metric.key]
        assert figure.low <= figure.value <= figure.high and figure.low < figure.high
    if case.labels:
        assert 0.1 < case.found.metrics[case.plan.task.metrics[0].key].value < 0.95


def test_the_page_shows_them(case):
    page = (case.data.parent / "kept" / "evaluation.html").read_text()
    for label in case.labels:
        assert f">{label}<" in page
    picture = PICTURES.get(case.plan.task.counts)
    assert picture is None or f'aria-label="{picture}' in page


PICTURES = {
    "errors": "Estimated against true",
    **dict.fromkeys(("confusion", "cells", "entities"), "F1 of each label"),
}


def of_labels(case, truth, said):
    """Figures of each label from what holds and what is answered, [records, labels]."""
    found, shares = {}, case.shares()
    for place, name in enumerate(case.labels):
        one, two, share = truth[:, place], said[:, place], shares[:, place]
        found[f"precision/{name}"] = precision_score(one, two)
        found[f"recall/{name}"] = recall_score(one, two)
        found[f"f1/{name}"] = f1_score(one, two)
        found[f"auroc/{name}"] = roc_auc_score(one, share)
        found[f"average_precision/{name}"] = average_precision_score(one, share)
    areas = [value for name, value in found.items() if name.startswith("auroc/")]
    return {**found, "auroc": np.mean(areas), "macro_f1": f1_score(truth, said, average="macro")}


def of_one(case):
    hot = [np.array([[one == n for n in case.labels] for one in ones]) for ones in
           (case.truths(), case.outputs())]  # fmt: skip
    return of_labels(case, *hot) | {"accuracy": (hot[0] == hot[1]).all(1).mean()}


def of_several(case):
    hot = [np.array([[n in ones for n in case.labels] for ones in many]) for many in
           (case.truths(), case.outputs())]  # fmt: skip
    micro = f1_score(*hot, average="micro")
    return of_labels(case, *hot) | {
        "micro_f1": micro,
        "exact_match": (hot[0] == hot[1]).all(1).mean(),
    }


def of_numbers(case):
    truth, said = np.array(case.truths(), dtype=float), np.array(case.outputs())
    return {
        "mae": mean_absolute_error(truth, said),
        "rmse": np.sqrt(np.mean((truth - said) ** 2)),
        "mean_error": np.mean(said - truth),
        "r2": r2_score(truth, said),
        "spearman": spearmanr(truth, said).statistic,
    }


def tags(text, spans):
    """Words of a text as B, I and O."""
    found = []
    for word in re.finditer(r"[^\W_]+|\S", text):
        inside = [s for s in spans if s["start"] <= word.start() < s["end"]]
        begins = inside and word.start() == inside[0]["start"]
        found.append(f"{'B' if begins else 'I'}-{inside[0]['label']}" if inside else "O")
    return found


def of_entities(case):
    texts = [record["text"] for record in case.records]
    pair = [list(map(tags, texts, spans)) for spans in (case.truths(), case.outputs())]
    told = classification_report(
        *pair, mode="strict", scheme=IOB2, output_dict=True, zero_division=0
    )
    there = Counter(s["label"] for spans in case.truths() for s in spans)
    found = {
        f"{ours}/{name}": told[name][theirs]
        for name in case.labels
        for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score"))
    }
    assert [told[name]["support"] for name in case.labels] == [there[name] for name in case.labels]
    every = told["micro avg"]
    return found | {
        "entity_f1": every["f1-score"],
        "entity_recall": every["recall"],
        "entity_precision": every["precision"],
    }


def of_losses(case):
    """One record after the other, by the task's own loss."""
    model = find_trained(case.run).load(device="cpu")
    lists = LISTS & {*case.plan.task.roles}
    losses = []
    for record in case.records:
        example = {k: json.dumps(v) if k in lists else v for k, v in record.items()}
        encoded = model.task.encode([example], model.tokenizer, plan=case.plan)
        with model.module.inference():
            batch = model.task.collate(encoded, [0], model.device)
            losses.append(float(model.task.losses(model.module, batch)))
    return {"loss": np.mean(losses), "perplexity": np.exp(np.mean(losses))}


KNOWN = {
    "confusion": of_one,
    "cells": of_several,
    "errors": of_numbers,
    "entities": of_entities,
    "losses": of_losses,
}
"""By what a task counts: all of its figures from what `predict` answered."""


def evaluated(run, data, *words):
    told = shown("json", "evaluate", str(run), "--data", str(data), "--draws", "100", *words)
    assert told.code == 0, told.errors
    return ModelEvaluation.model_validate_json(told.text)


CELLS = ("no;yes", "no", "[]", "odd;no")


def test_several_labels_may_stand_in_one_cell_and_one_of_them_has_a_threshold(
    tmp_path, bert_folder
):
    run = finished(tmp_path, bert_folder, model__multi_label=True)
    data = tmp_path / "a.csv"
    rows = [f'"{CORPUS[n % 6]} {n}",{CELLS[n % 4]}' for n in range(60)]
    data.write_text("\n".join(["text,codes", *rows]))
    words = ["--column", "labels=codes", "--label-separator", ";"]
    found = evaluated(run, data, *words, "--positive", "yes")
    assert found.records == 45 and [row.records for row in found.labels] == [30, 15, 0]
    assert len(found.left_out) == 1 and "odd" not in found.left_out[0]
    assert found.threshold.label == found.calibration.of == "yes" and found.temperature is None
    assert found.threshold.parts.chosen_on + found.threshold.parts.scored_on == 45
    plain = evaluated(run, data, *words)
    assert plain.threshold is None and plain.metrics == found.metrics


def test_words_and_tags_are_a_text_and_its_spans(tmp_path, bert_folder):
    run = finished(tmp_path, bert_folder, "token_classification", model__labels=["NAME", "PLACE"])
    records = [
        {
            "words": ["Ann", "Lee", "of", "Rome", str(n)],
            "tags": ["B-NAME", "I-NAME", "O", "B-PLACE", "O"],
        }
        for n in range(12)
    ]
    data = written(tmp_path / "a.jsonl", records)
    found = evaluated(run, data, "--column", "words=words", "--column", "tags=tags")
    assert {row.label: row.records for row in found.labels} == {"NAME": 12, "PLACE": 12}
    assert found.counted == "entities" and found.told_of_labels[:2] == ("precision", "recall")


def test_a_long_text_is_evaluated_to_its_end(tmp_path, bert_folder):
    run = finished(
        tmp_path, bert_folder, "token_classification", model__labels=["NAME"], data__max_windows=1
    )
    text = "quiet " * 80 + "Ann"
    spans = [{"start": 480, "end": 483, "label": "NAME"}]
    data = written(tmp_path / "a.jsonl", [{"text": text, "spans": spans}] * 2)
    assert [row.records for row in evaluated(run, data).labels] == [2]


def test_numbers_that_are_none_or_out_of_range_are_told_and_left_out(tmp_path, bert_folder):
    run = finished(tmp_path, bert_folder, "text_regression")
    data = tmp_path / "a.csv"
    data.write_text("text,value\neye,3\nfemur,secret\nkidney,77\nleft eye,4.5\n")
    found = evaluated(run, data)
    assert found.records == 2 and len(found.left_out) == 2
    assert "row 3" in found.left_out[0] and "row 4" in found.left_out[1]
    assert "secret" not in " ".join(found.left_out)


def test_a_label_is_asked_for_only_where_there_are_some(tmp_path, bert_folder):
    run = finished(tmp_path, bert_folder, "text_regression")
    data = tmp_path / "a.csv"
    data.write_text("text,value\neye,3\n")
    told = shown("plain", "evaluate", str(run), "--data", str(data), "--positive", "yes")
    assert told.code == 30 and "ST-300" in told.errors and "--positive" in told.errors
