"""`silotune simulate` as a person runs it: every kind of plan, in a terminal, in a pipe, as JSON."""

import pytest

from silotune.simulation.run_directory import RunDirectory
from tests.commands.terminal import shown
from tests.federation import PRIVATE, write_federation

QUICK = {"rounds.number": 3, "rounds.evaluate_every": 2}
SECURE = {"aggregation.secure": True, "aggregation.cohort": 3, "aggregation.threshold": 2}
PLANS = {
    "local": {**PRIVATE, **SECURE},
    "shared": {**PRIVATE, **SECURE, "privacy.noise": "shared"},
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("commanded"), bert_folder)


def words_of(federation, **changes):
    runs = federation.folder / "runs"
    settings = [f"--set={key}={_toml(value)}" for key, value in {**QUICK, **changes}.items()]
    return ["simulate", str(federation.plan_path), f"--runs={runs}", "--workers=1", *settings]


def _toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def newest(federation):
    """The run directory that a command left."""
    return RunDirectory.open(max((federation.folder / "runs").iterdir()))


def test_a_secure_run_goes_to_its_end_in_a_terminal(federation):
    found = shown("terminal", *words_of(federation, **PLANS["local"]))
    assert found.code == 0, found.text
    assert "3 rounds finished" in found.text
    assert "Report:" in found.text
    kinds = [event["event"] for event in newest(federation).events]
    assert kinds.count("site_phase") == 2 * 3 * 3
    assert newest(federation).final_adapter.is_dir()


def test_shared_noise_is_summed_up_as_json(federation):
    found = shown("json", *words_of(federation, **PLANS["shared"]))
    assert found.code == 0, found.errors
    assert found.facts["finished"]
    assert found.facts["rounds_finished"] == 3
    assert sorted(found.facts["sites_trained"]) == ["alpha", "beta", "gamma"]
    assert "round 3/3 adapter: 3/3 sites" in found.errors
