"""A base model in few bits, by the command line: checked, tried, trained, asked, and confined."""

import json
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from silotune import cli
from silotune.client.site_run import SiteRun
from silotune.client.training.bounds import table_of
from silotune.client.training.launcher import Launcher
from silotune.client.training.process import TrainerProcesses
from silotune.client.troubles import latest_troubles
from silotune.data.site import SiteConfig
from silotune.errors import ModelHashMismatch
from silotune.models.base import load_model
from silotune.models.features import compute_frozen
from silotune.models.layout import initial_adapter
from silotune.models.pretrained import weights_sha256
from silotune.privacy import quantized
from silotune.rounds.trained import load_trained
from tests.commands.commanded import newest, words
from tests.commands.terminal import shown
from tests.federation import PRIVATE, write_federation
from tests.models.architectures import NAMED, write_model
from tests.models.model_material import CORPUS, a_plan
from tests.whole_run import play_plan

KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("few"), bert_folder, names=("alpha", "beta"))


def typed(*words):
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("kind", KINDS)
def test_plan_check_tells_the_memory(federation, kind):
    path = str(federation.plan_path)
    facts = {
        kept: json.loads(typed("plan", "check", path, f"--set=model.quantization={kept}", "--json"))
        for kept in ("none", kind)
    }
    assert facts[kind]["base_bytes"] < 0.35 * facts["none"]["base_bytes"]
    assert facts[kind]["plan_sha256"] != facts["none"]["plan_sha256"]
    told = " ".join(
        shown("plain", "plan", "check", path, f"--set=model.quantization={kind}").text.split()
    )
    bits = {"int8": 8, "nf4": 4}[kind]
    assert f"Its frozen weights are kept in {bits} bits." in told
    assert re.search(
        rf"The frozen weights take \d+\.\d kB of each process's memory in {kind}", told
    )


def test_plan_check_refuses_a_model_whose_weights_are_elsewhere(federation, tmp_path):
    base = write_model(NAMED["Mixtral"], tmp_path, task="text_classification")
    sets = (f"--set=model.base={base}", "--set=model.quantization=nf4")
    told = shown("plain", "plan", "check", str(federation.plan_path), *sets)
    assert told.code == 30
    assert "most weights of the model are in layers that can't be kept in few bits" in told.errors


def test_the_weights_hash_is_that_of_the_files_and_is_checked_before(bert_folder, monkeypatch):
    good = weights_sha256(bert_folder)
    plan = a_plan(bert_folder, model__quantization="int8", model__sha256=good)
    assert "in int8" in load_model(plan).description
    monkeypatch.setattr(quantized, "quantize", lambda *_: pytest.fail("it was quantised first"))
    with pytest.raises(ModelHashMismatch):
        load_model(plan.override({"model.sha256": "0" * 64}))


@pytest.mark.parametrize("kind", KINDS)
def test_states_kept_of_frozen_layers_are_those_of_the_whole_model(bert_folder, kind):
    model = load_model(a_plan(bert_folder, lora__last_layers=1, model__quantization=kind))
    data = model.task.encode(
        [{"text": text, "label": "yes"} for text in CORPUS], model.tokenizer, plan=model.plan
    )
    assert model.module.prefix is not None
    frozen, rows = compute_frozen(model, data), [3, 0, 5]
    with torch.no_grad():
        cached = model.task.losses(model.module, frozen.inputs(model, data, rows))
        whole = model.task.losses(model.module, model.task.collate(data, rows, model.device))
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_simulated_run_in_few_bits_is_asked_in_few_bits(federation, tmp_path, kind):
    path = federation.folder / f"{kind}.toml"
    text = federation.plan_path.read_text().replace("[model]", f'[model]\nquantization = "{kind}"')
    path.write_text(text.replace("number = 5", "number = 3"))
    directory = play_plan(path, runs=tmp_path)
    said = json.loads(typed("predict", str(directory.root), "gout of the left side", "--json"))
    model = load_trained(directory.root, device="cpu")
    assert model.plan.model.quantization == kind
    assert any(isinstance(m, quantized.QuantizedLinear) for m in model.module.modules())
    (own,) = model.task.predict(model, [{"text": "gout of the left side"}])
    assert said["prediction"]["probabilities"] == pytest.approx(own.probabilities, abs=1e-5)
    assert len(set(own.probabilities.values())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_worker_processes_and_this_one_give_the_same_adapter(federation, kind):
    """By `silotune simulate` and `predict`, as typed."""
    settings = {**PRIVATE, "model.quantization": kind, "rounds.number": 3}
    typed(*words(federation, **settings), "--workers=2")
    first = newest(federation)
    typed(*words(federation, **settings), "--workers=1")
    one, other = (load_trained(run.root, device="cpu") for run in (first, newest(federation)))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert typed("predict", str(first.root), "gout").split()[0] in {"no", "yes"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_confined_trainer_trains_in_few_bits(federation, bert_folder, kind, tmp_path):
    """By the launcher of a real site: seccomp and Landlock in force, no network."""
    path = federation.folder / "alpha" / "site.toml"
    site = SiteConfig.load(path)
    plan = federation.plan.override(
        {
            **PRIVATE,
            "model.quantization": kind,
            "rounds.min_sites": 1,
            "optimizer.site.head_rounds": 0,
        }
    )
    launcher = Launcher(table_of(site, scratch=tmp_path / "t", models=[str(bert_folder)]))
    try:
        models = TrainerProcesses(site, launcher=launcher)
        part = SiteRun(site, state=tmp_path / "state", plan=plan, run="r", models=models)
        part.join()
        reply = part.train(initial_adapter(part.layout, plan), 1)
    finally:
        launcher.close()
    assert latest_troubles(tmp_path / "state") == []
    update = reply.array_records["update"]["flat"].numpy()
    assert np.isfinite(update).all() and update.any()
