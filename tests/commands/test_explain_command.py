"""`silotune explain`: what tokens add is a difference of logits, and is checked."""

import html
import json
import math
import re
import stat

import pytest
import torch
from captum.attr import LayerIntegratedGradients

from silotune.inference import explanation
from tests.commands.terminal import shown
from tests.commands.test_predict import finished
from tests.models.model_material import TEXTS

TEXT = TEXTS[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory, bert_folder):
    return finished(tmp_path_factory.mktemp("runs"), bert_folder)


@pytest.mark.parametrize("label", ["no", "yes", "perhaps"])
def test_what_tokens_add_is_the_difference_of_two_logits(run, label):
    told = shown("json", "explain", str(run), TEXT, "--label", label)
    assert told.code == 0, told.errors
    found = told.facts
    total = sum(part for _, part in found["tokens"])
    assert found["complete"] and found["total"] == pytest.approx(total)
    assert abs(total - found["difference"]) <= 0.02 * max(1, abs(found["difference"]))
    assert abs(found["difference"]) > 0.01 and max(abs(p) for _, p in found["tokens"]) > 0.01


def test_it_explains_the_answer_of_predict(run):
    answer = shown("json", "predict", str(run), TEXT).facts["prediction"]
    found = shown("json", "explain", str(run), TEXT).facts
    assert found["label"] == answer["label"]
    assert found["probability"] == pytest.approx(answer["probabilities"][answer["label"]], abs=1e-4)


def test_a_sum_that_is_off_gets_more_steps_and_is_never_passed_off(run, monkeypatch):
    asked = []

    def wrong(self, ids, *, n_steps, **settings):
        asked.append(n_steps)
        return torch.full((*ids.shape, 4), math.pi)

    monkeypatch.setattr(LayerIntegratedGradients, "attribute", wrong)
    found = shown("json", "explain", str(run), TEXT).facts
    assert asked == list(explanation.STEPS) and not found["complete"]
    assert "NOT close" in shown("plain", "explain", str(run), TEXT).text


def test_a_terminal_marks_tokens_by_more_than_colour(run):
    told = shown("terminal", "explain", str(run), TEXT)
    assert told.code == 0 and "\x1b[" in told.text
    assert "as it should be" in " ".join(told.text.split())


@pytest.mark.parametrize("settings", [{}, {"model__multi_label": True}])
def test_pairs_and_several_labels_are_explained_by_label(tmp_path, bert_folder, settings):
    run = finished(tmp_path, bert_folder, "pair_classification", **settings)
    texts = [TEXT, "of the left eye"]
    answer = shown("json", "predict", str(run), *texts).facts["prediction"]["probabilities"]
    likeliest = shown("json", "explain", str(run), *texts).facts
    assert likeliest["label"] == max(answer, key=answer.get)
    for label, probability in [*answer.items()][:2]:
        found = shown("json", "explain", str(run), *texts, "--label", label).facts
        assert found["complete"] and found["probability"] == pytest.approx(probability, abs=1e-4)
        assert sum(part for _, part in found["tokens"]) == pytest.approx(found["total"])
        words = "".join(word for word, _ in found["tokens"])
        assert all(text.replace(" ", "") in words.replace(" ", "") for text in texts)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "notes.csv"
    lines = [f'"{text} {n}",yes' for n in range(4) for text in TEXTS]
    path.write_text("\n".join(["note,label", *lines, '"<b>eye</b>",no', '"",no']) + "\n")
    return path


def explained(run, *words):
    told = shown("json", "explain", str(run), *words)
    assert told.code == 0, told.errors
    return [json.loads(line) for line in told.text.splitlines()]


def test_records_of_a_file_are_explained_by_their_rows(run, data):
    words = ["--data", str(data), "--column", "note"]
    found = explained(run, *words, "--rows", "3-4,18")
    assert [one["row"] for one in found] == [3, 4, 18]
    assert [one["text"] for one in found] == [f"{TEXTS[1]} 0", f"{TEXTS[2]} 0", "<b>eye</b>"]
    (alone,) = explained(run, found[0]["text"])
    assert found[0]["tokens"] == alone["tokens"]
    assert [one["row"] for one in explained(run, *words)] == list(range(2, 12))


@pytest.mark.parametrize(
    ("rows", "code"),
    [("99", 20), ("19", 20), ("1", 20), ("x", 2), ("2-", 2), ("5-2", 2), ("1-99999", 2)],
)
def test_rows_that_are_none_are_refused_by_their_number(run, data, rows, code):
    words = ["--data", str(data), "--column", "note", "--rows", rows]
    told = shown("plain", "explain", str(run), *words)
    assert told.code == code and "femur" not in told.errors
    if code == 20:
        assert "ST-205" in told.errors and f"row {rows}" in told.errors


def test_texts_and_a_file_are_not_both_given(run, data):
    for words in ([], [TEXT, "--data", str(data)], [TEXT, "--rows", "2"]):
        assert shown("plain", "explain", str(run), *words).code == 2


def test_a_page_shows_tokens_with_their_numbers_to_its_owner_only(run, data, tmp_path):
    out = tmp_path / "page.html"
    words = ["--data", str(data), "--column", "note", "--rows", "3,18", "--out", str(out)]
    told = shown("plain", "explain", str(run), *words)
    assert told.code == 0 and "own people" in told.text and TEXTS[1] not in told.text
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    page = out.read_text()
    assert "default-src 'none'" in page and "<script" not in page and "src=" not in page
    assert "<b>eye" not in page and "&lt;" in page
    (first, _) = explained(run, *words[:-2])
    shades = re.findall(r'class="token ((?:for|against)? ?s?\d?)">(.*?)<small>(.*?)</small>', page)[
        2:
    ]
    for (kind, word, adds), (token, part) in zip(shades, first["tokens"], strict=False):
        assert html.unescape(word) == (token.strip() or "\N{OPEN BOX}") and float(
            adds.replace("\N{MINUS SIGN}", "-")
        ) == round(part, 3)
        assert not kind or kind.startswith("for" if part > 0 else "against")
    assert {"for s4", "against s4"} & {kind for kind, _, _ in shades}


def test_what_has_no_label_of_a_text_is_refused(run, tmp_path, llama_folder):
    other = finished(tmp_path, llama_folder, "causal_lm")
    assert "ST-300" in shown("plain", "explain", str(other), TEXT).errors
    assert "ST-300" in shown("plain", "explain", str(run), TEXT, "--label", "maybe").errors


@pytest.mark.parametrize("task", ["text_regression", "token_classification"])
def test_tasks_whose_answer_is_no_label_are_refused_by_name(tmp_path, bert_folder, task):
    told = shown("plain", "explain", str(finished(tmp_path, bert_folder, task)), TEXT)
    assert told.code == 30 and "ST-300" in told.errors and task in told.errors
