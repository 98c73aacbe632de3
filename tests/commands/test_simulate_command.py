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


# --- sites that are not like the others -----------------------------------------------------------


def alone(tmp_path, bert_folder, names=("alpha", "beta", "gamma")):
    return write_federation(tmp_path, bert_folder, names=names)


def keep(federation, site, rows):
    """Leave this many records to a site, and let it declare that."""
    place = federation.folder / site
    lines = (place / "notes.csv").read_text().splitlines()
    (place / "notes.csv").write_text("\n".join([lines[0], *rows(lines[1:])]) + "\n")


def test_a_site_that_cannot_be_scored_is_left_out_of_that_figure_and_named(tmp_path, bert_folder):
    federation = alone(tmp_path, bert_folder)
    keep(federation, "alpha", lambda rows: rows[:2])
    found = shown("plain", *words_of(federation, **PRIVATE), "--baselines")
    assert found.code == 0, found.errors
    run = newest(federation)
    (federated,) = [m for m in run.read_json("results.json")["methods"] if m["key"] == "federated"]
    assert set(federated["by_site"]) == {"beta", "gamma"}
    assert "alpha has no record in the test data" in " ".join(found.text.split())
    assert "alpha has no record in the test data" in run.report_path.read_text()
    looks = [e for e in run.events if e["event"] == "evaluated"]
    assert {site for look in looks for site in look["left_out"]} == {"alpha"}


def test_a_site_that_refused_is_left_out_and_named_while_the_others_finish(tmp_path, bert_folder):
    federation = alone(tmp_path, bert_folder)
    keep(federation, "beta", lambda rows: [row.replace(",yes,", ",maybe,") for row in rows])
    found = shown("json", *words_of(federation, **PRIVATE), "--baselines")
    assert found.code == 0, found.errors
    assert found.facts["sites_trained"] == ["alpha", "gamma"]
    assert {row["site"] for row in found.facts["by_site"]} == {"alpha", "gamma"}
    assert any("beta (ST-205) refused to join" in line for line in found.facts["verdict"])
    assert "beta (ST-205) refused to join" in newest(federation).report_path.read_text()


@pytest.mark.parametrize("key", ["data.test_share", "data.validation_share"])
def test_without_held_out_data_a_run_ends_well_and_has_no_scores(federation, key):
    found = shown("plain", *words_of(federation, **{key: 0}), "--baselines")
    assert found.code == 0, found.errors
    assert "Report:" in found.text
    methods = newest(federation).read_json("results.json")["methods"]
    assert all(bool(m["test"]) == (key != "data.test_share") for m in methods)
    assert ("no test data were held out" in found.text) == (key == "data.test_share")
