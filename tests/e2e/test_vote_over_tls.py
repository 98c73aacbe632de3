"""A vote between real processes over TLS: proposed, approved, charged, counted, and made a plan of."""

import json

import pytest

from silotune.plan.plan import Plan
from silotune.plan.written import plan_toml
from silotune.report.votes import read
from tests.e2e.harness import cli
from tests.vote_sites import CANDIDATES, PRIVATE, SECURE, voting


@pytest.fixture
def voters(federation):
    """Sites whose policies allow votes; the plan that is voted on lies beside the vote."""
    made = federation()
    made.allow("text_classification", "votes")
    trained = made.plan.override({**PRIVATE, **SECURE, "rounds.min_sites": 3})
    (made.folder / "trained.toml").write_text(plan_toml(trained))
    made.plan_path.write_text(plan_toml(voting(trained)))
    return made.up()


@pytest.mark.slow
def test_a_deployed_vote_is_the_simulated_one_bit_for_bit_and_is_charged_once(voters, tmp_path):
    run = voters.propose()
    voters.coordinator.wait_finished(run)
    path = tmp_path / "votes.json"
    shown = voters.coordinator.cli("runs", "votes", run, "--out", path)
    found = read(path)
    assert shown == found
    assert voters.charges(run) == {name: [1] for name in voters.sites}

    there = read(voters.simulated().root / "votes.json")
    assert {**found, "run": ""} == {**there, "run": ""}

    said = cli("coordinator", "runs", "votes", run, "--dir", voters.coordinator.folder).stdout
    assert f"Chosen: candidate {found['chosen']}" in " ".join(said.split())
    words = ("runs", "adapter", run, "--out", tmp_path, "--dir", voters.coordinator.folder)
    refused = cli("coordinator", *words, check=False)
    assert refused.returncode != 0  # bare sums are no adapter

    made = tmp_path / "chosen.toml"
    cli("plan", "chosen", voters.folder / "trained.toml", path, "--out", made)
    (rate,) = {
        Plan.load(made).optimizer.site.head_lr,
        CANDIDATES[found["chosen"] - 1]["optimizer.site.head_lr"],
    }
    assert rate > 0

    (plan,) = json.loads(voters.sites["alpha"].site("plans", "--all", "--json").stdout)["plans"]
    told = dict(plan["words"])["Vote"]
    assert "by every one of 3 candidates" in told
    assert "No model, score or record leaves." in told


@pytest.mark.slow
def test_a_site_whose_policy_says_nothing_of_votes_takes_part_in_none(federation):
    made = federation()
    trained = made.plan.override({**PRIVATE, **SECURE, "rounds.min_sites": 3})
    made.plan_path.write_text(plan_toml(voting(trained)))
    made.up()
    run = made.propose()
    row = made.coordinator.wait_over(run)
    assert row["state"] == "failed"
    (plan,) = json.loads(made.sites["alpha"].site("plans", "--all", "--json").stdout)["plans"]
    (clause,) = [each for each in plan["verdict"] if each["clause"] == "tasks"]
    assert clause["allowed"] is False
    assert "votes" in clause["reason"]
    assert made.charges(run) == {name: [] for name in made.sites}
