"""Attacks on whole simulated runs: they win without privacy, and claims hold with it."""

import shutil

import pytest

from silotune.errors import AttackRefused, RunDirectoryInvalid
from silotune.privacy.certificate import verify
from silotune.release import examine
from silotune.report.report import write_report
from silotune.rounds.run_directory import RunDirectory
from silotune.simulation.attack import CAVEAT, attack
from silotune.simulation.run import Settings, simulate
from tests.commands.terminal import shown
from tests.federation import write_federation

# Many rounds of nearly every record: what a small model needs to learn canaries by heart.
EAGER = {
    "rounds.number": 150,
    "rounds.evaluate_every": 0,
    "privacy.rate": 1.0,
    "optimizer.site.head_rounds": 0,
    "optimizer.site.adapter_lr": 0.02,
    "optimizer.site.head_lr": 0.2,
    "lora.r": 8,
}
BY_HEART = {
    **EAGER,
    "rounds.number": 300,
    "optimizer.site.adapter_lr": 0.05,
    "lora.r": 16,
    "data.max_length": 64,
}


class Here(Settings):
    """Everything in this process."""

    def worker_count(self, sites):
        return 0


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished private run."""
    directory, _ = whole
    shutil.copytree(directory.root, tmp_path / "run")
    return RunDirectory.open(tmp_path / "run")


def test_a_private_run_keeps_its_claims_and_says_what_was_tried(finished):
    said = []
    found = attack(finished, settings=Here(), say=said.append)
    assert any("round 5 of 5" in sentence for sentence in said)
    assert not found.violated
    assert 1.0 < found.audit.lower_bound < found.audit.claimed
    assert found.membership.claimed == pytest.approx(8.0, rel=0.01)
    # Half of 100 canaries: an AUC is off by 0.25 with a probability below 1e-4 when nothing leaks.
    assert abs(found.separation.auc - 0.5) < 0.25
    stored = finished.read_json("privacy.json")["attacks"]
    assert stored["audit"]["measured_lower_bound"] == found.audit.lower_bound
    signed = verify(finished.site("alpha") / "certificate.json").body.measured
    assert signed.audit.lower_bound == found.audit.lower_bound
    assert signed.membership.claimed == found.membership.claimed
    assert stored["membership"]["claimed_epsilon"] == found.membership.claimed
    assert stored["caveat"] == CAVEAT
    assert len(stored["tried"]) == 2
    controls = {control.name: control for control in examine(finished).controls}
    assert controls["audit"].passed
    assert controls["membership"].passed
    page = write_report(finished.root).read_text()
    assert "Attacked by the simulator" in page
    assert "claimed ε" in page
    assert "A low bound proves nothing" in page


def test_a_report_without_attacks_has_no_such_section(finished):
    assert "Attacked by" not in write_report(finished.root).read_text()


def test_a_site_may_refuse(finished, federation):
    config = federation.folder / "beta" / "site.toml"
    text = config.read_text()
    config.write_text("allow_attacks = false\n" + text)
    try:
        with pytest.raises(AttackRefused, match="beta"):
            attack(finished, settings=Here(), say=lambda sentence: None)
    finally:
        config.write_text(text)


def test_a_run_that_is_not_finished_is_not_attacked(tmp_path):
    directory = RunDirectory.create(tmp_path, "run", plan_toml="")
    directory.write_json("resolved.json", {})
    with pytest.raises(RunDirectoryInvalid, match="not finished"):
        attack(directory, settings=Here(), say=lambda sentence: None)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["terminal", "json"])
def test_the_command_attacks_what_it_made_and_what_was_finished(tmp_path, bert_folder, form):
    federation = write_federation(tmp_path, bert_folder)
    words = (
        *("simulate", str(federation.plan_path), f"--runs={tmp_path / 'runs'}", "--attack"),
        *("--workers=1", "--set=rounds.number=3", "--set=privacy.mode=record"),
        *("--set=privacy.epsilon=8.0", "--set=privacy.delta=1e-4"),
        "--set=privacy.clip={head = 1.0, adapter = 1.0}",
    )
    first = shown(form, *words)
    assert first.code == 0, first.text + first.errors
    (root,) = (tmp_path / "runs").iterdir()
    (root / "attacks.json").unlink()
    again = shown(form, "simulate", "--resume", str(root), "--attack", "--workers=1")
    assert again.code == 0, again.text + again.errors
    for found in (first, again):
        if form == "json":
            assert found.facts["attacks"]["audit"]["one_run"] > 0
        else:
            assert "A low bound proves nothing" in " ".join(found.text.split())


@pytest.mark.slow
def test_without_privacy_membership_is_found_out(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder)
    found = attack(played(federation, EAGER), settings=Settings(), say=lambda sentence: None)
    assert found.audit.lower_bound > 8
    # Where nothing leaks, half of 100 canaries give an AUC above 0.68 once in a thousand.
    assert found.separation.auc > 0.68
    assert found.membership.claimed is None
    assert not found.violated


@pytest.mark.slow
def test_a_language_model_without_privacy_remembers_its_canaries(tmp_path, llama_folder):
    federation = write_federation(tmp_path, llama_folder)
    for site in federation.sites:
        config = site.folder / "site.toml"
        text = config.read_text().replace('text = "note"', 'prompt = "note"')
        config.write_text(text.replace('label = "chronic"', 'response = "chronic"'))
    text = federation.plan_path.read_text().replace("text_classification", "causal_lm")
    text = text.replace('labels = ["no", "yes"]\n', "").replace("head_rounds = 2\n", "")
    federation.plan_path.write_text(text)
    directory = played(federation, BY_HEART)
    found = attack(directory, settings=Settings(), say=lambda sentence: None)
    # Where nothing leaks, half of 100 canaries give an AUC above 0.75 once in 100,000, and one of
    # thirty secrets has ten bits or more once in thirty runs.
    assert found.separation.auc > 0.75
    assert found.memorisation.largest > 10.0
    write_report(directory.root)
    assert "Planted secrets" in directory.report_path.read_text()


def played(federation, overrides):
    return simulate(
        federation.plan_path,
        runs=federation.folder / "runs",
        settings=Settings(),
        listener=lambda event: None,
        overrides=overrides,
    )
