"""Votes by the command line: `tune --private`, `plan vote`, `plan check`, `plan chosen`."""

import json
import re
import tomllib

import pytest

from silotune.plan.plan import Plan, candidates_of
from silotune.plan.written import plan_toml
from silotune.report.votes import read
from silotune.simulation import run
from tests.commands.terminal import shown
from tests.federation import write_federation
from tests.vote_sites import PRIVATE, SECURE
from tests.whole_run import in_this_process

VARY = "--vary=optimizer.site.head_lr=0.3,0.000001"


def typed(*words, form="plain"):
    """The exit code, and all that is before a person, in one line."""
    found = shown(form, *map(str, words))
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", found.text + found.errors)
    return found.code, " ".join(plain.split())


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(run, "WorkerGrid", in_this_process)


@pytest.fixture
def plan(tmp_path, bert_folder):
    """The plan's file, beside three sites; it trains an adapter after two rounds of the head."""
    made = write_federation(tmp_path / "sites", bert_folder)
    trained = made.plan.override({**PRIVATE, **SECURE, "plan.seed": None})
    made.plan_path.write_text(plan_toml(trained))
    return made.plan_path


def test_tune_in_private_votes_writes_the_plan_that_came_of_it_and_says_what_it_cost(plan):
    words = ("tune", plan, "--private", VARY, "--epsilon=4", "--block-units=20", "--workers=1")
    code, said = typed(*words, form="terminal")
    assert code == 0, said
    folder = plan.parent / "plan-vote"
    (path,) = (folder / "runs").iterdir()
    found = read(path / "votes.json")
    assert f"Chosen: candidate {found['chosen']}" in said
    assert "candidates train its head alone, in all 5 rounds" in said
    assert "ε = 4.00 at δ = " in said
    assert "for each record, charged to every site's ledger" in said
    assert "looked at the sites' records" not in said  # as searches say, which are not paid for
    chosen = Plan.load(folder / "chosen.toml")
    assert chosen.optimizer.site.head_lr == found["settings"]["optimizer.site.head_lr"]
    before = Plan.load(plan).override(found["settings"])
    assert chosen.sha256 == before.sha256  # nothing else was changed


def test_the_plan_of_a_vote_is_checked_and_its_choice_made_a_plan_for_scripts(plan, tmp_path):
    out = tmp_path / "vote.toml"
    code, said = typed(
        "plan", "vote", plan, VARY, "--vary=rounds.number=2,4", "--out", out, "--epsilon=2"
    )
    assert code == 0, said
    made = Plan.load(out)
    assert [(p.optimizer.site.head_lr, p.rounds.number) for p in candidates_of(made)] == [
        (0.3, 2), (0.3, 4), (1e-6, 2), (1e-6, 4),
    ]  # fmt: skip
    assert made.vote.units == 60 + 80 + 100
    _, said = typed("plan", "check", out, "--sizes=60,80,100")
    assert "3 blocks vote; each number of votes comes with noise of" in said
    assert "it is mostly noise that chooses" in said
    facts = shown("json", "plan", "check", str(out), "--sizes=6000").facts
    assert facts["bytes_up"] == 16
    assert facts["noise_of_votes"] > 0


def test_what_can_not_be_voted_on_is_told_at_once(plan):
    for vary, told in (
        ("optimizer.site.head_lr=0.1:1.0", "candidates of a vote are fixed"),
        ("privacy.epsilon=1.0,2.0", "can't be voted on"),
        ("optimizer.site.head_lr=0.1", "vote.candidates"),
        ("optimizer.site.adapter_lr=0.1,0.2", "candidates train a head alone"),
    ):
        code, said = typed("tune", plan, "--private", f"--vary={vary}")
        assert code != 0
        assert told in said
    assert "give --vary key=value,value" in typed("tune", plan, "--private")[1]
    assert not (plan.parent / "plan-vote").exists()


def test_votes_on_another_plan_choose_nothing(plan, tmp_path):
    votes = tmp_path / "votes.json"
    told = {
        "format": "silotune votes 1",
        "plan": "another",
        "settings": {},
        "chosen": 1,
        "epsilon": 1,
    }
    votes.write_text(json.dumps(told))
    code, said = typed("plan", "chosen", plan, votes, "--out", tmp_path / "chosen.toml")
    assert code != 0
    assert "is a vote on the plan 'another'" in said
    assert not (tmp_path / "chosen.toml").exists()
    told |= {"plan": "small", "settings": {"optimizer.site.head_lr": 0.7}}
    votes.write_text(json.dumps(told))
    typed("plan", "chosen", plan, votes, "--out", tmp_path / "chosen.toml")
    made = tomllib.loads((tmp_path / "chosen.toml").read_text())
    assert made["optimizer"]["site"]["head_lr"] == 0.7


def test_the_help_of_tune_teaches_the_private_way():
    _, said = typed("tune", "--help")
    for part in (
        "--private",
        "--epsilon",
        "--block-units",
        "a block votes for what did best there",
    ):
        assert part in said.replace("│ ", "")
