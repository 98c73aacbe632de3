"""`silotune simulate` as a person runs it: secure plans, odd sites, no held-out data, failures.

Here the sites are played by this process.
"""

import shutil
import time

import pytest

from silotune.errors import BudgetExceeded
from silotune.events.source import RunDirectories
from silotune.simulation import run
from silotune.simulation.grid import WorkerGrid
from tests.commands.commanded import MODELS, SECURED, newest, words
from tests.commands.terminal import shown
from tests.dashboard.browsing import HTML, browser, of
from tests.federation import PRIVATE, write_federation

ODD = ("alpha", "beta", "empty", "kind", "record", "unit")
LORA = MODELS["lora"]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(run, "WorkerGrid", lambda *a, **k: WorkerGrid(*a, **{**k, "workers": 0}))


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("commanded"), bert_folder)


def test_a_secure_run_goes_to_its_end_in_a_terminal(federation):
    found = shown("terminal", *words(federation, **SECURED["local"], **LORA))
    assert found.code == 0, found.text
    assert "3 rounds finished" in found.text
    assert "Report:" in found.text
    kinds = [event["event"] for event in newest(federation).events]
    assert kinds.count("site_phase") == 2 * 3 * 3
    assert newest(federation).final_adapter.is_dir()


def test_shared_noise_is_summed_up_as_json(federation):
    found = shown("json", *words(federation, **SECURED["shared"], **LORA))
    assert found.code == 0, found.errors
    assert found.facts["finished"]
    assert found.facts["rounds_finished"] == 3
    assert sorted(found.facts["sites_trained"]) == ["alpha", "beta", "gamma"]
    assert "round 3/3 adapter: 3/3 sites" in found.errors


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rounds.min_sites": 4}, "rounds.min_sites"),
        (
            SECURED["local"] | {"aggregation.cohort": 7, "aggregation.threshold": 5},
            "aggregation.threshold",
        ),
    ],
    ids=["min_sites", "threshold"],
)
def test_a_plan_for_more_sites_than_are_here_is_told_at_once(federation, settings, key):
    begun = time.monotonic()
    found = shown("plain", *words(federation, **settings, **LORA))
    assert found.code == 60
    assert "3 sites are here" in found.errors
    assert key in found.errors
    assert time.monotonic() - begun < 60  # not the 600 s of the plan's deadline


def test_without_held_out_data_a_run_ends_well_and_has_no_scores(federation):
    nothing = {"data.test_share": 0, "data.validation_share": 0}
    found = shown("plain", *words(federation, **nothing, **LORA))
    assert found.code == 0, found.errors
    assert "no test data were held out" in found.text
    (method,) = newest(federation).read_json("results.json")["methods"]
    assert method["test"] == {}
    assert not [e for e in newest(federation).events if e["event"] == "evaluated"]
    assert newest(federation).report_path.is_file()


@pytest.mark.slow  # with baselines, which are trained for each
@pytest.mark.parametrize("key", ["data.test_share", "data.validation_share"])
def test_either_share_may_be_zero_with_baselines_too(federation, key):
    found = shown("plain", *words(federation, **{key: 0}, **LORA), "--baselines")
    assert found.code == 0, found.errors
    methods = newest(federation).read_json("results.json")["methods"]
    assert {"federated", "own", "pooled"} <= {m["key"] for m in methods}
    assert all(bool(m["test"]) == (key != "data.test_share") for m in methods)


# --- sites that are not like the others -----------------------------------------------------------


def odd_federation(folder, bert_folder):
    """Two healthy sites, and one each with one record, one kind, one patient and no record."""
    made = write_federation(folder, bert_folder, patients=True, names=ODD)
    text = made.plan_path.read_text().replace("rate = 0.2", 'rate = 0.2\nunit = "patient"')
    made.plan_path.write_text(f"{text}max_records_per_unit = 2\n")
    _keep(made, "empty", lambda rows: [])
    _keep(made, "kind", lambda rows: [row for row in rows if ",no," in row])
    _keep(made, "record", lambda rows: rows[:1])
    _keep(made, "unit", lambda rows: rows[:2])
    return made


def _keep(federation, site, choose):
    path = federation.folder / site / "notes.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *choose(rows)]) + "\n")


def test_sites_of_one_record_one_kind_one_unit_and_none_are_in_one_run_with_healthy_ones(
    tmp_path, bert_folder
):
    federation = odd_federation(tmp_path, bert_folder)
    found = shown("json", *words(federation, **PRIVATE, **LORA))
    assert found.code == 0, found.errors
    assert {"alpha", "beta", "kind"} <= set(found.facts["sites_trained"])
    scored = {row["site"] for row in found.facts["by_site"]}
    assert {"alpha", "beta"} <= scored
    # By the plan's seed the patient of "unit" is a test patient, and the one of "record" is not.
    assert scored.isdisjoint({"empty", "record"})
    assert set(found.facts["left_out"]) == set(ODD) - scored
    told = " ".join(found.facts["verdict"])
    page = newest(federation).report_path.read_text()
    for site, code in found.facts["left_out"].items():
        assert (f"{site} ({code})" if code else site) in told
        assert site in page
    looks = [event for event in newest(federation).events if event["event"] == "evaluated"]
    assert all(set(look["left_out"]) >= {"empty", "record"} for look in looks)


def test_a_site_that_refused_is_in_no_figure_and_the_others_finish(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder)
    config = federation.folder / "beta" / "site.toml"
    config.write_text(config.read_text().replace("path =", 'labels = ["no", "maybe"]\npath ='))
    found = shown("json", *words(federation, **PRIVATE, **LORA))
    assert found.code == 0, found.errors
    assert found.facts["sites_trained"] == ["alpha", "gamma"]
    assert {row["site"] for row in found.facts["by_site"]} == {"alpha", "gamma"}
    assert any("beta (ST-210) refused to join" in line for line in found.facts["verdict"])
    assert "beta (ST-210) refused to join" in newest(federation).report_path.read_text()


# --- how a run ends -------------------------------------------------------------------------------


def test_a_run_that_every_site_refused_is_over_for_the_dashboard_too(tmp_path, bert_folder):
    federation = write_federation(tmp_path, bert_folder)
    found = shown("plain", *words(federation, **{**PRIVATE, **LORA, "privacy.epsilon": 20.0}))
    assert found.code != 0
    root = newest(federation).root
    facts = RunDirectories(root).facts(root.name)
    assert (facts.state, facts.round) == ("failed", 0)
    page = browser(of(RunDirectories(root))).get(f"/runs/{root.name}", headers=HTML).text
    assert "failed" in page
    assert f"every site refused to join with {BudgetExceeded.code}" in page


def test_a_run_goes_on_after_it_was_stopped_and_ends_as_the_whole_one(federation, monkeypatch):
    whole = shown("json", *words(federation, **LORA)).facts["run_directory"]
    stopped_at = []

    def interrupt(self, number, *rest, **more):
        if number == 2 and not stopped_at:
            stopped_at.append(number)
            raise KeyboardInterrupt
        return after_round(self, number, *rest, **more)

    after_round = run.AdapterScorer.after_round
    monkeypatch.setattr(run.AdapterScorer, "after_round", interrupt)
    assert shown("plain", *words(federation, **LORA)).code == 130
    cut = newest(federation).root
    assert RunDirectories(cut).facts(cut.name).state == "stopped"
    found = shown("terminal", "simulate", f"--resume={cut}")
    assert found.code == 0, found.text
    assert "resumed after round 2" in found.text
    name = "final/adapter_model.safetensors"
    both = [(path / "adapters" / name).read_bytes() for path in (cut, cut.parent / whole)]
    assert both[0] == both[1]
    shutil.rmtree(cut)
