"""Promise 3: the site's policy outranks the plan, fails closed, and a refusal names the clause.

Every clause is broken by a message that the federation has really signed, over the wire.
"""

import json

import pytest

from silotune.client.daemon.daemon import Daemon
from silotune.client.errors import PolicyMissing
from silotune.data.site import PolicyConfig, SiteConfig
from silotune.plan.voted import VOTES
from silotune.protocol.envelope import refusal_code
from tests.client.coordinator_double import CoordinatorDouble
from tests.client.site_rig import Rig
from tests.federation import write_federation
from tests.vote_sites import voting

# What breaks the clause: in the plan, or in the policy.
PLANS = {
    "require_privacy": ({"privacy.mode": "none", "privacy.epsilon": None, "privacy.delta": None,
                         "privacy.clip": None}, "ST-505"),
    "max_epsilon": ({"privacy.epsilon": 8.5}, "ST-502"),
    "max_delta": ({"privacy.delta": 2e-3}, "ST-504"),
    "base_models": ({"model.sha256": "ab" * 32}, "ST-509"),
    "target_modules": ({"lora.target_modules": ["query"]}, "ST-511"),
    "max_rounds": ({"rounds.number": 11}, "ST-513"),
    "max_upload_mb": ({"lora.r": 512}, "ST-514"),
    "max_total_epsilon": ({"privacy.epsilon": 7.9, "plan.name": "second"}, "ST-503"),
}  # fmt: skip
POLICIES = {
    "allow_seeded_noise": ({"allow_seeded_noise": False}, "ST-506"),
    "require_secure_aggregation": ({"require_secure_aggregation": True}, "ST-507"),
    "min_cohort": ({"min_cohort": 2}, "ST-508"),
    "tasks": ({"tasks": ["causal_lm"]}, "ST-510"),
    "strategies": ({"strategies": ["fedprox"]}, "ST-512"),
    "hours": ({"hours": []}, "ST-515"),
}

JOINS = (("query.join", 0), ("train", 1))
UNSEEDED = {"plan.seed": None}


@pytest.fixture(scope="module")
def rig(tmp_path_factory, bert_folder):
    folder = tmp_path_factory.mktemp("policy")
    double = CoordinatorDouble(folder / "coordinator")
    with double, Rig(folder / "sites", bert_folder, double) as rig:
        rig.approve("first")
        assert refusal_code(rig.ask("query.join", run="first")) is None
        yield rig


def answers(rig, run, plan, code):
    """Join, train and evaluate are refused with the code, and nothing is charged."""
    before = rig.ledger_rows()
    rig.approve(run, plan)  # even what the site's people have approved
    for kind, number in (("query.join", 0), ("train", 1), ("evaluate", 2)):
        assert refusal_code(rig.ask(kind, number, run=run, plan=plan)) == code, kind
    assert rig.ledger_rows() == before


@pytest.mark.parametrize("clause", PLANS)
def test_a_plan_that_breaks_a_clause_is_refused_by_its_name(rig, clause):
    settings, code = PLANS[clause]
    answers(rig, f"run-{clause}".replace("_", "-"), rig.plan.override(settings), code)
    assert f"policy.{clause}: " in rig.refusals()[-1]["detail"]


@pytest.mark.parametrize("clause", POLICIES)
def test_a_policy_that_has_changed_holds_from_the_next_message_on(rig, clause, monkeypatch):
    changes, code = POLICIES[clause]
    written = {**rig.site.policy.model_dump(), **changes}
    policy = PolicyConfig.model_validate(
        {k: tuple(v) if isinstance(v, list) else v for k, v in written.items()}
    )
    stricter = rig.site.model_copy(update={"policy": policy})
    stricter._folder = rig.site.folder
    monkeypatch.setattr(rig.runner, "_site", stricter)
    monkeypatch.setattr(rig.runner, "_part", None)
    answers(rig, f"run-{clause}".replace("_", "-"), rig.plan.override({"plan.name": "x"}), code)
    assert f"policy.{clause}: " in rig.refusals()[-1]["detail"]


def test_every_clause_is_broken_here():
    # No delta that a plan may have is 1/60 or more: `allow_large_delta` is broken in test_policy.
    elsewhere = {"approval", "allow_large_delta"}
    assert set(PLANS) | set(POLICIES) == set(PolicyConfig.model_fields) - elsewhere


def test_a_refusal_carries_its_code_and_nothing_else(rig):
    plan = rig.plan.override({"rounds.number": 11})
    rig.approve("nothing-else", plan)
    content = rig.ask("query.join", run="nothing-else", plan=plan)
    assert dict(content["refusal"]) == {"code": "ST-513"}
    assert list(content) == ["refusal"]


def test_the_word_can_be_taken_back(rig):
    rig.approve("taken-back")
    rig.documents.decide("taken-back", "rejected", reason="we thought again", by="test")
    assert refusal_code(rig.ask("query.join", run="taken-back")) == "ST-517"


def test_an_approval_is_for_one_plan_and_one_run(rig):
    rig.approve("one")
    changed = rig.plan.override({"optimizer.site.head_lr": 0.2})
    rig.double.propose("one", changed)
    rig.take_plans()
    assert refusal_code(rig.ask("query.join", run="one", plan=changed)) == "ST-516"
    assert refusal_code(rig.ask("query.join", run="one")) == "ST-516"
    rig.double.propose("two", rig.plan)
    assert refusal_code(rig.ask("query.join", run="two")) in {"ST-516", "ST-642"}


def test_candidates_of_a_vote_that_changed_after_it_was_approved_are_tried_on_no_record(
    rig, monkeypatch
):
    voters = rig.site.model_copy(
        update={
            "policy": rig.site.policy.model_copy(update={"tasks": (rig.plan.model.task, VOTES)})
        }
    )
    voters._folder = rig.site.folder
    monkeypatch.setattr(rig.runner, "_site", voters)
    monkeypatch.setattr(rig.runner, "_part", None)
    vote = voting(rig.plan.override(UNSEEDED), units=60, epsilon=0.1)
    rig.approve("vote", vote)
    before = rig.ledger_rows()
    rates = [{"optimizer.site.head_lr": rate} for rate in (0.3, 0.7)]
    other = vote.override({"vote.candidates": rates})
    refused = {kind: rig.ask(kind, number, run="vote", plan=other) for kind, number in JOINS}
    assert {kind: refusal_code(content) for kind, content in refused.items()} == {
        "query.join": "ST-516", "train": "ST-516",
    }  # fmt: skip
    assert refusal_code(rig.ask("query.join", run="vote", plan=vote)) is None
    for kind, number in JOINS:  # nor under the name of the vote that is now open
        assert refusal_code(rig.ask(kind, number, run="vote", plan=other)) is not None, kind
    rig.double.propose("vote", other)
    rig.take_plans()  # a new proposal under the old name takes the old word with it
    for plan in (other, vote):
        assert refusal_code(rig.ask("train", 1, run="vote", plan=plan)) == "ST-516"
    kinds = {row.entry.kind for row in rig.ledger_rows()[len(before) :]}
    assert "reserve" in kinds and "charge" not in kinds


def test_a_paused_site_answers_nothing(rig):
    rig.paused = True
    try:
        assert refusal_code(rig.ask("query.join", run="first")) == "ST-640"
    finally:
        rig.paused = False
    assert refusal_code(rig.ask("query.join", run="first")) is None


def test_a_forged_approval_does_not_count(rig):
    """Somebody who can write the state folder, but has not the site's key."""
    rig.double.propose("forged", rig.plan)
    rig.take_plans()
    rig.approve("genuine")
    path = rig.state / "plans" / "forged.json"
    stored = json.loads(path.read_text())
    genuine = json.loads((rig.state / "plans" / "genuine.json").read_text())["decision"]
    stored["decision"] = {**genuine, "run": "forged"}
    path.write_text(json.dumps(stored))
    assert refusal_code(rig.ask("query.join", run="forged")) == "ST-516"


def test_without_a_policy_there_is_no_daemon(tmp_path, bert_folder):
    made = write_federation(tmp_path, bert_folder)
    with pytest.raises(PolicyMissing):
        Daemon(SiteConfig.load(made.folder / "alpha" / "site.toml"))
