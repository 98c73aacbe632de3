"""A trained model is found in its run's directory, and in the adapter's own folder wherever it lies."""

import json
import shutil

import pytest

from silotune.errors import AdapterMismatch, ModelHashMismatch, RunDirectoryInvalid
from silotune.models.adapter import PLAN, SETTINGS, read_adapter
from silotune.models.pretrained import weights_sha256
from silotune.rounds.trained import find_trained, load_trained
from tests.commands.test_predict import finished
from tests.models.model_material import TEXTS, a_plan


@pytest.fixture(scope="module")
def run(tmp_path_factory, bert_folder):
    return finished(tmp_path_factory.mktemp("runs"), bert_folder)


def answers(model):
    return model.task.predict(model, [{"text": text} for text in TEXTS])


def test_an_adapter_that_was_copied_away_says_what_its_run_says(run, bert_folder, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapters" / "final", folder)
    here, away = load_trained(run, device="cpu"), load_trained(folder, device="cpu")
    assert (read_adapter(here) == read_adapter(away)).all()
    assert [a.output for a in answers(here)] == [a.output for a in answers(away)]
    moved = tmp_path / "elsewhere"
    shutil.copytree(bert_folder, moved)
    elsewhere = load_trained(folder, base=str(moved), device="cpu")
    assert answers(elsewhere) == answers(away)


def test_a_base_model_elsewhere_must_still_be_the_plans(tmp_path, bert_folder, llama_folder):
    sha = weights_sha256(bert_folder)
    folder = finished(tmp_path, bert_folder, model__sha256=sha) / "adapters" / "final"
    assert find_trained(folder).plan.model.sha256 == sha
    with pytest.raises(ModelHashMismatch):
        load_trained(folder, base=str(llama_folder), device="cpu")


def test_a_plan_that_was_changed_beside_its_adapter_is_refused(run, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapters" / "final", folder)
    said = json.loads((folder / PLAN).read_text())
    said["model"]["labels"] = ["perhaps", "yes", "no"]
    (folder / PLAN).write_text(json.dumps(said))
    with pytest.raises(AdapterMismatch):
        load_trained(folder)


def test_an_adapter_of_an_earlier_version_takes_the_plan_that_it_was_trained_by(
    run, bert_folder, tmp_path
):
    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapters" / "final", folder)
    (folder / PLAN).unlink()
    with pytest.raises(AdapterMismatch, match="missing"):
        find_trained(folder)
    plan = a_plan(bert_folder)
    assert load_trained(folder, plan=plan, device="cpu").plan == plan
    with pytest.raises(AdapterMismatch, match="another plan"):
        find_trained(folder, plan=plan.override({"lora.r": 3}))
    (folder / SETTINGS).unlink()
    with pytest.raises(RunDirectoryInvalid):
        find_trained(folder)
