"""Whole simulations with noise that is correlated over rounds."""

import json
from unittest.mock import patch

import pytest
from safetensors.numpy import load_file

from silotune.plan.plan import Plan
from silotune.privacy.attacks.bounds import audit_step
from silotune.privacy.ledger import Ledger
from silotune.report.report import write_report
from silotune.rounds.run_directory import read_record
from silotune.simulation import run
from silotune.simulation.attack import attack
from silotune.simulation.run import Settings, resume, simulate
from silotune.simulation.step_audit import step_scores
from tests.federation import SITES, banded, write_federation
from tests.forked import forked_workers
from tests.whole_run import in_this_process

ROUNDS, BANDS = 7, 3
BANDED = banded(ROUNDS)


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("correlated"), bert_folder)


class Stopped(Exception):
    pass


def play(federation, name, *, stop_after=None, settings=None, **overrides):
    def listen(event):
        if (event["event"], event.get("round")) == ("site_replied", stop_after):
            raise Stopped

    where = forked_workers() if settings else patch.object(run, "WorkerGrid", in_this_process)
    with where:
        return simulate(
            federation.plan_path,
            runs=federation.folder / name,
            settings=settings or Settings(workers=1),
            listener=listen,
            overrides={**BANDED, **overrides},
        )


@pytest.fixture(scope="module")
def whole(federation):
    return play(federation, "whole")


def final(directory):
    arrays = load_file(directory.adapter_of_round(ROUNDS))
    return {name: array.tobytes() for name, array in arrays.items()}


def plan_of(directory):
    return Plan.from_mapping(read_record(directory.root).plan)


def test_weights_were_chosen_and_privacy_says_what_the_books_say(whole):
    plan = plan_of(whole)
    assert len(plan.privacy.band_weights) == BANDS
    stated = json.loads((whole.root / "privacy.json").read_text())
    for site in SITES:
        facts = stated["sites"][site]
        assert facts["steps"] == 3
        assert facts["rate"] == pytest.approx(0.9)
        assert 7.9 < facts["epsilon"] <= 8.0
        assert [number for number, _ in facts["epsilon_by_round"]] == [1, 4, 7]
        ledger = Ledger(whole.site(site) / "ledger.sqlite", create=False)
        assert facts["epsilon"] == pytest.approx(ledger.spent("notes", 1e-4), rel=1e-6)
        ledger.close()
    spent = [e["epsilon"]["alpha"] for e in whole.events if e["event"] == "round_finished"]
    assert spent == sorted(spent)
    assert len(set(spent)) == 3  # a block is paid for at its first round
    assert spent[-1] == pytest.approx(stated["sites"]["alpha"]["epsilon"], rel=1e-6)


@pytest.mark.parametrize("killed_in", [2, 4, 6])
def test_a_run_killed_anywhere_in_a_block_goes_on_to_the_same_adapter(federation, whole, killed_in):
    with pytest.raises(Stopped):
        play(federation, f"killed-{killed_in}", stop_after=killed_in)
    (path,) = (federation.folder / f"killed-{killed_in}").iterdir()
    with patch.object(run, "WorkerGrid", in_this_process):
        directory = resume(path, settings=Settings(workers=1), listener=lambda event: None)
    assert final(directory) == final(whole)
    for site in SITES:
        ledger = Ledger(directory.site(site) / "ledger.sqlite", create=False)
        rows = [r.entry for r in ledger.rows() if r.entry.kind == "charge"]
        assert sorted(e.round for e in rows if e.release == "block") == [1, 4, 7]
        assert sorted(e.round for e in rows if e.release == "update") == list(range(1, ROUNDS + 1))
        ledger.close()


@pytest.mark.slow
def test_ray_gives_the_same_adapter(federation, whole):
    pytest.importorskip("ray")
    found = play(federation, "ray", settings=Settings(workers=2, engine="ray"))
    assert final(found) == final(whole)


def test_under_secure_aggregation_local_noise_is_correlated_too(federation):
    secure = {"aggregation.secure": True, "aggregation.cohort": 3, "aggregation.threshold": 2}
    found = play(federation, "secure", **secure)
    stated = json.loads((found.root / "privacy.json").read_text())
    for site in SITES:
        # Others' noise is not counted on: sites that miss rounds correlate theirs otherwise.
        assert [row["to"] for row in stated["sites"][site]["exposures"]] == [
            "the coordinator, whoever colludes with it"
        ]
        assert 7.9 < stated["sites"][site]["epsilon"] <= 8.0


def test_shares_of_correlated_noise_cost_the_plans_epsilon_and_are_reported(federation):
    shared = {
        "aggregation.secure": True,
        "aggregation.cohort": 3,
        "aggregation.threshold": 2,
        "privacy.noise": "shared",
    }
    found = play(federation, "shared", **shared)
    stated = json.loads((found.root / "privacy.json").read_text())
    for site in SITES:
        facts = stated["sites"][site]
        assert 7.9 < facts["epsilon"] <= 8.0
        assert facts["steps"] == 3
        assert facts["exposures"][0]["epsilon"] == facts["epsilon"]
    # Two units of one person may be drawn in rounds whose noise has to do with another.
    assert stated["two_sites"]["epsilon"] > 2 * 8.0
    assert "two sites" in write_report(found.root).read_text()


def test_workers_give_the_same_adapter_and_comparisons_beside_it(federation, whole):
    found = play(federation, "compared", settings=Settings(workers=2, baselines=True))
    assert final(found) == final(whole)
    keys = [method["key"] for method in found.read_json("results.json")["methods"]]
    assert {"pooled", "own"} <= set(keys)
    write_report(found.root)


def test_a_report_says_what_is_charged(whole):
    page = write_report(whole.root).read_text()
    assert "blocks of 3 rounds" in page


def test_steps_of_every_unit_are_not_taken_for_releases_of_metrics(federation):
    """Both have a rate of 1, and metrics are released in more rounds than there are blocks."""
    often = {"privacy.bands": 4, "privacy.rate": 0.25, "rounds.evaluate_every": 1}
    found = play(federation, "often", **often, **{"privacy.metrics_share": 0.2})
    joined = {e["site"]: e["sigma"] for e in found.events if e["event"] == "site_joined"}
    for site, facts in json.loads((found.root / "privacy.json").read_text())["sites"].items():
        assert (facts["steps"], facts["rate"], facts["sigma"]) == (2, 1.0, joined[site])
        assert [number for number, _ in facts["epsilon_by_round"]] == [1, 5]


def test_a_step_is_audited_with_what_a_block_costs(federation, whole):
    seen = step_scores(plan_of(whole), federation.sites, canaries=2000, seed=1)
    found = audit_step(seen.scores, seen.coins, claimed=seen.claimed, mu=seen.mu, delta=1e-4)
    assert 1.0 < found.lower_bound < found.claimed  # before sampling hides who took part


@pytest.mark.slow
def test_canaries_in_a_whole_run_stay_within_its_epsilon(federation, whole):
    found = attack(whole, settings=Settings(workers=2), say=lambda line: None)
    assert not found.violated
