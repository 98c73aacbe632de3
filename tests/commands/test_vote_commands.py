"""Votes by the command line: `tune --private`, `plan vote`, `plan check`, `plan chosen`."""

import json
import re
import subprocess
import sys
import tomllib

import pytest
from typer.main import get_command

from silotune.cli import app
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
    by_hand = folder / "by-hand.toml"
    assert typed("plan", "chosen", plan, path / "votes.json", "--out", by_hand)[0] == 0
    assert by_hand.read_text() == (folder / "chosen.toml").read_text()


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
    assert "scores will flatter" in typed("plan", "check", plan)[1]
    assert (
        "scores will flatter" not in typed("plan", "check", out)[1]
    )  # held-out records score nothing
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
        ("optimizer.site.head_lr=0.1", "vote.candidates: expected at least 2 items, got 1"),
        ("optimizer.site.adapter_lr=0.1,0.2", "candidates train a head alone"),
        ("optimizer.site.head_lr=.1,1", "values as TOML has them: 0.1 and not .1"),
    ):
        code, said = typed("tune", plan, "--private", f"--vary={vary}")
        assert code != 0
        assert told in said
    assert "give --vary key=value,value" in typed("tune", plan, "--private")[1]
    assert not (plan.parent / "plan-vote").exists()


def test_a_vote_is_on_a_plan_that_trains_and_is_never_written_over_it(plan, tmp_path):
    before, out = plan.read_bytes(), tmp_path / "vote.toml"
    code, said = typed("plan", "vote", plan, VARY, "--out", plan)
    assert (code, plan.read_bytes()) == (2, before)
    assert "this is the plan that is voted on" in said
    assert typed("plan", "vote", plan, VARY, "--out", out)[0] == 0
    again = tmp_path / "again.toml"
    code, said = typed("plan", "vote", out, VARY, "--units=240", "--out", again)
    assert code != 0
    assert "small-vote trains nothing: give the plan that is to be trained" in said
    assert not again.exists()


def test_where_no_site_is_the_units_of_all_or_of_each_are_said(plan, tmp_path):
    alone = tmp_path / "alone" / "plan.toml"
    alone.parent.mkdir()
    alone.write_bytes(plan.read_bytes())
    code, said = typed("plan", "vote", alone, VARY, "--out", tmp_path / "none.toml")
    assert code == 2
    assert "no site folder lies beside the plan: say how many" in said
    code, said = typed("plan", "vote", alone, VARY, "--units=many", "--out", tmp_path / "none.toml")
    assert code == 2
    assert "whole numbers, e.g. 1000,2500" in said
    for units in ("5750", "1750,4000"):
        assert (
            typed("plan", "vote", alone, VARY, f"--units={units}", "--out", alone.parent / units)[0]
            == 0
        )
    assert (alone.parent / "5750").read_bytes() == (alone.parent / "1750,4000").read_bytes()


def test_a_vote_is_written_without_the_libraries_of_training(plan, tmp_path):
    out = tmp_path / "vote.toml"
    code = (
        "import sys; from silotune.cli import app; app(sys.argv[1:], standalone_mode=False);"
        "print(*sorted({'torch', 'transformers', 'flwr'} & set(sys.modules)), sep=',')"
    )
    words = ("plan", "vote", str(plan), VARY, "--out", str(out))
    found = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert out.exists()
    assert found.stdout.splitlines()[-1] == ""


def test_a_block_has_as_many_units_by_command_as_by_a_plan_that_says_nothing(plan, tmp_path):
    out = tmp_path / "vote.toml"
    assert typed("plan", "vote", plan, VARY, "--out", out)[0] == 0
    tables = tomllib.loads(out.read_text())
    said = tables["vote"].pop("block_units")
    left_out = Plan.from_mapping(tables)
    assert left_out.vote.block_units == said == Plan.load(out).vote.block_units
    asked = {each.name: each.default for each in get_command(app).commands["tune"].params}
    assert asked["block_units"] == said


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--epsilon=1"], "--epsilon: is of a vote: add --private. A search has no epsilon"),
        (["--block-units=50"], "--block-units: is of a vote: add --private"),
        (
            ["--private", "--trials=3"],
            "--trials: is of a search; a vote (--private) has none of it",
        ),
        (["--private", "--to-the-end"], "--early: is of a search"),
    ],
)
def test_an_option_of_the_other_way_to_tune_is_refused_and_not_ignored(plan, option, told):
    code, said = typed("tune", plan, VARY, *option)
    assert code == 2
    assert told in said.replace("│ ", "")
    assert {each.name for each in plan.parent.glob("plan-*")} == set()


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
    before = plan.read_bytes()
    code, said = typed("plan", "chosen", plan, votes, "--out", plan)
    assert (code, plan.read_bytes()) == (2, before)
    assert "this is the plan that is voted on" in said


def test_the_help_of_tune_teaches_the_private_way():
    _, said = typed("tune", "--help")
    for part in (
        "--private",
        "--epsilon",
        "--block-units",
        "a block votes for what did best there",
    ):
        assert part in said.replace("│ ", "")
