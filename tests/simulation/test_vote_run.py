"""Runs of votes: what they cost, what is left of them, and that a seeded one is the same again."""

import json
from unittest.mock import patch

import numpy as np
import pytest

from silotune.errors import PlanInvalid, RunDirectoryInvalid
from silotune.plan.plan import Plan
from silotune.plan.written import plan_toml
from silotune.privacy import certificate
from silotune.privacy.ledger import Ledger
from silotune.report.report import summary, write_report
from silotune.report.votes import read
from silotune.rounds import votes
from silotune.rounds.trained import find_trained
from silotune.simulation import run
from silotune.simulation.attack import attack
from silotune.simulation.run import Settings
from tests.federation import SITES
from tests.vote_sites import SECURE, voting, write_voters
from tests.whole_run import go_on, in_this_process


@pytest.fixture(scope="module")
def voters(tmp_path_factory, bert_folder):
    return write_voters(tmp_path_factory.mktemp("votes"), bert_folder)


def vote(voters, name, *, plan=None, **overrides):
    made, _, own = voters
    path = made.folder / "vote.toml"
    path.write_text(plan_toml(plan or own))
    with patch.object(run, "WorkerGrid", in_this_process):
        return run.simulate(
            path,
            runs=made.folder / name,
            settings=Settings(workers=1, device="cpu"),
            listener=lambda event: None,
            overrides=overrides,
        )


@pytest.fixture(scope="module")
def together(voters):
    return vote(voters, "together")


def test_a_vote_is_one_charged_release_of_the_vote_s_epsilon(together, voters):
    _, _, plan = voters
    assert together.read_json("privacy.json")["private"] is True
    for name in SITES:
        body = certificate.verify(together.site(name) / "certificate.json").body
        assert 0.99 * plan.privacy.epsilon < body.epsilon <= plan.privacy.epsilon
        events = Ledger(together.site(name) / "ledger.sqlite", create=False).events("notes")
        assert len(events) == 1


def test_the_votes_are_those_of_all_blocks_but_for_their_noise(together):
    """Of all votes together: seven deviations of the noise of their sum, once in 3e11."""
    found = read(together.root / "votes.json")
    blocks = sum(site["blocks"] for site in found["sites"].values())
    assert blocks == 4 + 5 + 7
    votes_given = [one["votes"] for one in found["candidates"]]
    assert sum(votes_given) == pytest.approx(blocks, abs=7 * found["noise"] * 3**0.5)
    assert votes_given[found["chosen"] - 1] == max(votes_given)
    assert 0.0 < found["probability"] <= 1.0


def test_a_vote_leaves_its_votes_and_no_bare_sum_or_adapter(together):
    assert not list((together.root / "adapters").iterdir())
    (told,) = [event for event in together.events if event["event"] == "votes"]
    found = read(together.root / "votes.json")
    assert found == {"run": together.name, **told["found"]}
    assert summary(together.root) == found
    page = write_report(together.root).read_text()
    assert page.startswith("<!doctype html>")
    assert page.endswith("</html>")
    assert f"Chosen: candidate {found['chosen']}" in page
    with pytest.raises(RunDirectoryInvalid, match="trained nothing"):
        find_trained(together.root)
    with pytest.raises(RunDirectoryInvalid, match="trained nothing"):
        attack(together, settings=Settings(workers=1), say=print)


def test_a_seeded_vote_is_the_same_again_and_says_that_it_is_not_private(voters):
    one, other = (
        read(vote(voters, name, **{"plan.seed": 4}).root / "votes.json") for name in ("one", "two")
    )
    assert one["private"] is False
    assert {**one, "run": ""} == {**other, "run": ""}


def test_in_the_clear_each_site_adds_all_of_the_noise(voters, tmp_path, bert_folder):
    _, trained, plan = voters
    bare = dict.fromkeys(SECURE)
    found = read(vote(voters, "bare", plan=voting(trained.override(bare))).root / "votes.json")
    shared = read(vote(voters, "again", plan=plan).root / "votes.json")
    assert (found["noise"] / shared["noise"]) ** 2 == pytest.approx(3.0)


def test_a_run_that_dies_before_its_votes_are_told_tells_the_very_same_later(voters):
    seen, real = [], votes.find

    def dies(*args, **words):
        seen.append(real(*args, **words))
        raise KeyboardInterrupt

    with patch.object(votes, "find", dies), pytest.raises(KeyboardInterrupt):
        vote(voters, "dies")
    (path,) = (voters[0].folder / "dies").iterdir()
    found = read(go_on(path).root / "votes.json")
    assert {key: found[key] for key in seen[0]} == json.loads(json.dumps(seen[0]))
    for name in SITES:
        book = Ledger(path / "sites" / name / "ledger.sqlite", create=False)
        assert len(book.events("notes")) == 1


def test_wrong_candidates_are_refused_before_anything_is_there(voters):
    made, _, plan = voters
    tables = json.loads(plan.canonical())
    tables["vote"]["candidates"][1] = {"optimizer.site.head_lr": "fast"}
    with pytest.raises(PlanInvalid, match=r"number 2: optimizer\.site\.head_lr"):
        Plan.from_mapping(tables)
    with pytest.raises(PlanInvalid, match="trains nothing"):
        run.simulate(
            made.folder / "vote.toml",
            runs=made.folder / "never",
            settings=Settings(baselines=True),
            listener=lambda event: None,
        )
    assert not (made.folder / "never").exists()
    assert np.isfinite(plan.privacy.epsilon)
