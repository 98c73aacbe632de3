"""`silotune explain`: what tokens add is a difference of logits, and is checked."""

import math

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


def test_what_has_no_label_of_a_text_is_refused(run, tmp_path, llama_folder):
    other = finished(tmp_path, llama_folder, "causal_lm")
    assert "ST-300" in shown("plain", "explain", str(other), TEXT).errors
    assert "ST-300" in shown("plain", "explain", str(run), TEXT, "--label", "maybe").errors
