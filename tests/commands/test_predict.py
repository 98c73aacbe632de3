"""`silotune predict` as its user meets it: one answer a record, greedy, told apart."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from typer.testing import CliRunner

from silotune import cli
from silotune.api.model import Model
from silotune.models.adapter import save_adapter
from silotune.models.base import load_model
from silotune.rounds.run_directory import RunDirectory
from tests.commands.terminal import shown
from tests.federation import CHOICES
from tests.models.model_material import a_plan


def finished(folder, base, task="text_classification", *, seed=5, **settings):
    """The directory of a finished run whose adapter is random numbers."""
    plan = a_plan(base, task, **settings)
    directory = RunDirectory.create(folder, "run", plan_toml="")
    facts = {"plan": json.loads(plan.canonical()), "choices": asdict(CHOICES)}
    directory.write_json("resolved.json", facts)
    model = load_model(plan, device="cpu", attention="eager", dtype="float32")
    flat = np.random.default_rng(seed).normal(0, 0.3, model.layout.size).astype(np.float32)
    save_adapter(model, flat, directory.final_adapter, plan=plan)
    return directory.root


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, bert_folder):
    return finished(tmp_path_factory.mktemp("runs"), bert_folder)


@pytest.fixture(scope="module")
def answerer(tmp_path_factory, llama_folder):
    return finished(tmp_path_factory.mktemp("runs"), llama_folder, "causal_lm")


def said(run, *words, given: bytes | None = None):
    result = CliRunner().invoke(cli.app, ["predict", str(run), *words], input=given)
    assert result.exit_code == 0, result.output
    return result.output


def texts_of(run, *words, given: bytes) -> list[str]:
    lines = said(run, "-", "--json", *words, given=given).splitlines()
    return [json.loads(line)["text"] for line in lines]


THREE = ["acute injury\nof the eye", "left, femur", "diabetes"]
QUOTED = '"acute injury\nof the eye"\n"left, femur"\ndiabetes\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (QUOTED, []),
        (f"text\n{QUOTED}", []),
        ("".join(json.dumps({"text": text}) + "\n" for text in THREE), []),
        ("".join(json.dumps({"note": text}) + "\n\n" for text in THREE), ["--column", "note"]),
    ],
)
@pytest.mark.parametrize("windows", [False, True])
def test_a_record_is_answered_once_whatever_lines_it_spans(classifier, content, words, windows):
    raw = content.replace("\n", "\r\n") if windows else content
    found = texts_of(classifier, *words, given=raw.encode())
    assert [text.replace("\r\n", "\n") for text in found] == THREE


def test_a_table_gives_the_column_that_is_named(classifier):
    table = 'id;note;label\n1;"acute;\neye";no\n2;;no\n3;left eye;yes\n'
    assert texts_of(classifier, "--column", "note", given=table.encode()) == [
        "acute;\neye",
        "",
        "left eye",
    ]


def test_an_empty_line_keeps_its_place_and_gets_no_answer(classifier):
    lines = said(classifier, "-", "--json", given=b"eye\n\nfemur\n").splitlines()
    found = [json.loads(line) for line in lines]
    assert [record["text"] for record in found] == ["eye", "", "femur"]
    assert [record["prediction"] is None for record in found] == [False, True, False]
    assert said(classifier, "-", given=b"eye\n\nfemur\n").splitlines()[1] == "(an empty text)"


def test_plain_lines_may_have_commas_and_quotes(classifier):
    lines = ["chronic kidney disease, stage 4", 'the "left" eye', '"open, and not closed']
    assert texts_of(classifier, given="\n".join(lines).encode()) == lines


def test_an_adapter_alone_predicts_what_its_run_does(classifier, tmp_path):
    folder = tmp_path / "taken away"
    shutil.copytree(classifier / "adapters" / "final", folder)
    assert said(folder, "eye", "femur") == said(classifier, "eye", "femur")


@pytest.mark.parametrize(
    ("words", "given", "code"),
    [
        (["--format", "csv"], b"note\nx\n", "ST-204"),
        (["--column", "note"], b'{"text": "x"}\n', "ST-204"),
        (["--format", "jsonl"], b"not json\n", "ST-203"),
        ([], b"\xff\xfe", "ST-203"),
    ],
)
def test_input_that_can_not_be_read_is_told(classifier, words, given, code):
    result = CliRunner().invoke(cli.app, ["predict", str(classifier), "-", *words], input=given)
    assert result.exception.code == code


def test_several_answers_are_told_apart(answerer):
    shown = said(answerer, "-", given=b'"the eye,\nwhich"\nstage\n').splitlines()
    assert "[1] the eye, which" in shown
    second = shown.index("[2] stage")
    assert shown[second - 1] == ""
    assert not said(answerer, "stage").startswith("[1]")


SETTINGS = {"repetition_penalty": 9.0, "suppress_tokens": [5], "no_repeat_ngram_size": 1}


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_greedy_is_greedy_whatever_the_base_model_says(answerer, llama_folder, tmp_path, file):
    base = tmp_path / "base"
    shutil.copytree(llama_folder, base)
    path = base / file
    path.write_text(json.dumps(json.loads(path.read_text()) | SETTINGS))
    run = finished(tmp_path / "runs", base, "causal_lm")
    words = ["acute", "chronic kidney disease", "eye"]
    assert said(run, *words) == said(answerer, *words)


def test_an_answer_is_over_where_the_base_model_was_taught_to_end(answerer, llama_folder, tmp_path):
    """A base model that ends at any token answers with one."""
    whole = json.loads(said(answerer, "acute", "--json"))["prediction"]
    base = tmp_path / "base"
    shutil.copytree(llama_folder, base)
    path = base / "generation_config.json"
    every = list(range(json.loads((base / "config.json").read_text())["vocab_size"]))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": every}))
    run = finished(tmp_path / "runs", base, "causal_lm")
    shorter = json.loads(said(run, "acute", "--json"))["prediction"]
    assert whole.startswith(shorter.rstrip("\ufffd"))
    assert len(shorter) < len(whole)


def test_answers_by_chance_are_the_same_with_a_seed_and_no_longer_than_asked(answerer):
    words = ["acute", "eye"]
    drawn = ["--sample", "1.5", "--top-p", "0.9", "--seed", "3", "--max-new-tokens", "8"]
    assert said(answerer, *words, *drawn) == said(answerer, *words, *drawn)
    assert said(answerer, *words, *drawn) != said(answerer, *words, *drawn, "--seed", "4")
    assert len(said(answerer, "acute", "--max-new-tokens", "2")) < len(said(answerer, "acute"))


def test_a_classifier_has_no_answers_by_chance(classifier):
    result = CliRunner().invoke(cli.app, ["predict", str(classifier), "a", "--sample", "1"])
    assert result.exit_code == 2
    assert "writes no text" in result.output


def test_a_terminal_obeys_nothing_that_a_model_writes(answerer, monkeypatch):
    written = "Dear\x1b]0;title\x07\nyou\xa0!\u202e"
    monkeypatch.setattr(Model, "answers", lambda self, asked: [{"prediction": written}])
    seen = shown("terminal", "predict", str(answerer), "a letter")
    assert seen.code == 0 and seen.text.split("\r\n") == [
        "Dear\ufffd]0;title\ufffd",
        "you\xa0!\ufffd",
        "",
    ]
    assert shown("plain", "predict", str(answerer), "a letter").text == f"{written}\n"
