"""`silotune export adapter`: each form is loaded as its user does, and gives the adapter's answers."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import silotune
from silotune.api.exporting import EXPORT_FILE, TOLERANCES
from silotune.cli import app
from silotune.errors import (
    ExportInTheWay,
    ExportRefused,
    ExtraMissing,
    ReleaseInvalid,
)
from silotune.release import RELEASE_FILE, Statement, hashes_of, sign
from silotune.trust.identity import load_or_create
from tests.commands.test_predict import finished

TEXTS = ["acute injury of the eye", "femur", "chronic kidney disease </s> stage 4"]
GRAPHS = [pytest.param(form, marks=pytest.mark.slow) for form in ("onnx", "int8")]
FORMS = ["peft", "merged", *GRAPHS]
"""The exporter of graphs takes seconds for the smallest model."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bert_folder, llama_folder):
    folder = tmp_path_factory.mktemp("runs")
    centred = {"model__centre_texts": ["the eye", "a kidney", "the left leg"]}
    cosines = {"model__head_features": {"kind": "cosines", "number": 64, "scale": 1.0}, **centred}
    return {
        "plain": finished(folder, bert_folder),
        "cosines": finished(folder, bert_folder, **cosines),
        "answers": finished(folder, llama_folder, "causal_lm"),
    }


def export(run, to, *words):
    found = CliRunner().invoke(app, ["export", "adapter", str(run), "--to", str(to), *words])
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.stdout


def code_of(card):
    return re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]


def by_card(folder):
    """What the card's own code defines, run in the folder as a reader would."""
    with contextlib.chdir(folder):
        names = {}
        exec(code_of(folder / "README.md"), names)
    return names


@pytest.fixture
def without_a_seed(tmp_path, bert_folder):
    """Runs whose cosines come from the plan's hash, by how their weights are kept."""

    def made(kind):
        cosines = {"kind": "cosines", "number": 64, "scale": 1.0}
        settings = {"model__quantization": kind, "model__head_features": cosines}
        settings |= {"model__centre_texts": ["the eye", "a kidney", "the left leg"]}
        return finished(tmp_path / "runs", bert_folder, plan__seed=None, **settings)

    return made


@pytest.mark.parametrize(
    ("form", "kind"),
    [("merged", "int8"), ("merged", "nf4"), pytest.param("onnx", "nf4", marks=pytest.mark.slow)],
)
def test_weights_in_few_bits_are_exported_as_the_run_had_them(without_a_seed, tmp_path, form, kind):
    run = without_a_seed(kind)
    told = json.loads(export(run, tmp_path / "out", "--format", form, "--json"))
    assert told["difference"] <= told["tolerance"] == 1e-3
    own = silotune.load(run, device="cpu").predict(TEXTS)
    wanted = np.array([list(one.probabilities.values()) for one in own])
    found = torch.as_tensor(by_card(tmp_path / "out")["logits"](TEXTS)).softmax(1).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_an_adapter_alone_is_compared_on_the_weights_that_it_was_trained_on(
    without_a_seed, tmp_path
):
    run = without_a_seed("int8")
    told = json.loads(export(run, tmp_path / "out", "--json"))
    assert told["difference"] <= told["tolerance"] == 1e-4
    own = silotune.load(run, device="cpu").predict(TEXTS)
    shares = by_card(tmp_path / "out")["logits"](TEXTS).softmax(1)
    for found, prediction in zip(shares.tolist(), own, strict=True):  # close, not equal
        assert found == pytest.approx(list(prediction.probabilities.values()), abs=0.05)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["plain", "cosines"])
def test_the_cards_code_gives_the_adapters_answers(runs, tmp_path, kind, form):
    told = json.loads(export(runs[kind], tmp_path / "out", "--format", form, "--json"))
    assert told["difference"] <= told["tolerance"] == TOLERANCES[form]
    names = by_card(tmp_path / "out")
    own = silotune.load(runs[kind], device="cpu").predict(TEXTS)
    wanted = np.array([list(one.probabilities.values()) for one in own])
    found = torch.as_tensor(names["logits"](TEXTS)).softmax(1).numpy()
    np.testing.assert_allclose(found, wanted, atol=5e-2 if form == "int8" else 1e-4)
    imported = code_of(tmp_path / "out" / "README.md")
    assert ("peft" in imported) == (form == "peft")
    kept = json.loads((tmp_path / "out" / EXPORT_FILE).read_text())
    assert kept["difference"] == told["difference"]
    assert kept["made_of"] == hashes_of(runs[kind] / "adapters" / "final")


@pytest.mark.parametrize("form", ["merged", GRAPHS[0]])
def test_the_cards_code_reads_two_texts_where_the_task_does(bert_folder, tmp_path, form):
    run = finished(tmp_path / "runs", bert_folder, "pair_classification")
    export(run, tmp_path / "out", "--format", form)
    found = by_card(tmp_path / "out")["logits"](TEXTS, TEXTS[::-1])
    pairs = [{"text": a, "text_b": b} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
    own = silotune.load(run, device="cpu").predict(pairs)
    wanted = np.array([list(one.probabilities.values()) for one in own])
    np.testing.assert_allclose(torch.as_tensor(found).softmax(1).numpy(), wanted, atol=1e-4)


def test_a_merged_language_model_answers_by_transformers_alone(runs, tmp_path):
    export(runs["answers"], tmp_path / "out", "--format", "merged")
    names = by_card(tmp_path / "out")
    own = silotune.load(runs["answers"], device="cpu").predict(TEXTS)
    assert [names["answer"](text) for text in TEXTS] == [one.output for one in own]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("lora" in name for name, _ in loaded.named_parameters())


@pytest.mark.slow
def test_a_language_model_as_a_graph_gives_the_logits_of_every_token(runs, tmp_path):
    import onnxruntime

    export(runs["answers"], tmp_path / "merged", "--format", "merged")
    export(runs["answers"], tmp_path / "graph", "--format", "onnx")
    ids = AutoTokenizer.from_pretrained(tmp_path / "graph")(TEXTS[0], return_tensors="pt")
    inputs = {name: ids[name] for name in ("input_ids", "attention_mask")}
    session = onnxruntime.InferenceSession(tmp_path / "graph" / "model.onnx")
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(**inputs).logits
    np.testing.assert_allclose(found, own.numpy(), atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_head_on_every_token_is_exported_with_the_rest(bert_folder, tmp_path, form):
    run = finished(tmp_path / "runs", bert_folder, "token_classification")
    told = json.loads(export(run, tmp_path / "out", "--format", form, "--json"))
    assert told["difference"] <= told["tolerance"]
    if form in {"peft", "merged"}:
        assert by_card(tmp_path / "out")["predict"]("acute injury")


@pytest.mark.slow
def test_eight_bits_are_about_a_quarter_of_the_weights(runs, tmp_path):
    for form in ("onnx", "int8"):
        export(runs["plain"], tmp_path / form, "--format", form)
    sizes = {
        form: sum(path.stat().st_size for path in (tmp_path / form).glob("model.onnx*"))
        for form in ("onnx", "int8")
    }
    assert sizes["int8"] < 0.75 * sizes["onnx"]  # a tiny model is mostly graph
    assert sorted(path.name for path in (tmp_path / "int8").glob("*.onnx*")) == ["model.onnx"]


@pytest.mark.parametrize("form", ["merged", GRAPHS[0]])
def test_a_form_that_answers_otherwise_is_refused_and_leaves_nothing(runs, tmp_path, form):
    with pytest.raises(ExportRefused, match="differ by"):
        export(runs["plain"], tmp_path / "out", "--format", form, "--tolerance", "1e-12")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_was_changed_since_is_found_by_its_answers(runs, tmp_path, monkeypatch):
    """As if a library wrote other weights than it was given."""
    from silotune.models import exported

    plain = exported.loaded_by_peft

    def other(model, folder, *, base):
        arrays = load_file(folder / "adapter_model.safetensors")
        changed = {name: array * np.float32(1.05) for name, array in arrays.items()}
        save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return plain(model, folder, base=base)

    monkeypatch.setattr(exported, "loaded_by_peft", other)
    with pytest.raises(ExportRefused):
        export(runs["plain"], tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone(runs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ExportInTheWay):
        export(runs["plain"], tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


@pytest.fixture
def released(runs, tmp_path):
    """A run with two sites' certificates and a signed release of its adapter."""
    run = tmp_path / "runs" / "released"
    shutil.copytree(runs["plain"], run)
    for site in ("north", "south"):
        (run / "sites" / site).mkdir(parents=True)
        (run / "sites" / site / "certificate.json").write_text(f'{{"site": "{site}"}}')
    plan = silotune.load(run, device="cpu").plan
    statement = Statement(
        run="released", plan_sha256=plan.sha256, files=hashes_of(run / "adapters" / "final"),
        certificates={}, controls=(), person="Ada Smith", role="output checker",
        code_version="0", time="2026-11-29T18:00:00+00:00",
    )  # fmt: skip
    sign(statement, run / RELEASE_FILE, key=load_or_create(tmp_path / "key.pem"))
    return run


def test_certificates_card_and_release_travel_with_the_adapter_and_on_from_there(
    released, tmp_path
):
    shown = export(released, tmp_path / "one")
    assert "2 certificates of sites and a signed release" in " ".join(shown.split())
    export(tmp_path / "one", tmp_path / "two", "--format", "merged")
    for folder in (tmp_path / "one", tmp_path / "two"):
        names = {path.name for path in (folder / "certificates").iterdir()}
        assert names == {"north.json", "south.json"}
        assert (folder / RELEASE_FILE).read_bytes() == (released / RELEASE_FILE).read_bytes()
        assert "Trained without differential privacy" in (folder / "README.md").read_text()


def test_an_adapter_that_is_not_the_signed_one_is_not_exported(released, tmp_path):
    head = released / "adapters" / "final" / "head.safetensors"
    arrays = load_file(head)
    arrays["head.bias"] = arrays["head.bias"] + np.float32(1)
    save_file(arrays, head, metadata={"format": "pt"})
    with pytest.raises(ReleaseInvalid, match=r"head\.safetensors"):
        export(released, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_onnx_the_extra_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExtraMissing) as caught:
        export(runs["plain"], tmp_path / "out", "--format", "onnx")
    assert caught.value.remedy == "pip install 'silotune[onnx]'"


@pytest.mark.slow
def test_nothing_of_silotune_is_needed_to_use_a_merged_folder(runs, tmp_path):
    export(runs["plain"], tmp_path / "out", "--format", "merged")
    code = code_of(tmp_path / "out" / "README.md")
    hidden = "import sys; sys.modules['silotune'] = sys.modules['peft'] = None"
    script = f"{hidden}\n{code}\nprint(*predict(['eye']))"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "out", capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[-1] in {"no", "yes", "perhaps"}
