"""Every clause of a policy lets pass what it allows, refuses what it doesn't, and says which it was."""

import json
from datetime import datetime

import pytest

from silotune.client import errors
from silotune.client.policy import Facts, judge, judge_moment
from silotune.data.site import PolicyConfig
from silotune.errors import PolicyError
from silotune.plan.plan import Plan

SHA = "ab" * 32
PLAN = {
    "plan": {"name": "p", "purpose": "tests"},
    "model": {"base": "m", "sha256": SHA, "task": "text_classification", "labels": ["a", "b"]},
    "lora": {"target_modules": ["query", "value"]},
    "data": {"dataset": "notes"},
    "rounds": {"number": 10, "min_sites": 3},
    "privacy": {"mode": "record", "epsilon": 2.0, "delta": 1e-5, "clip": 1.0, "batch": 8},
}
POLICY = {
    "max_epsilon": 2.0,
    "max_total_epsilon": 5.0,
    "max_delta": 1e-5,
    "require_secure_aggregation": False,
    "min_cohort": 3,
    "base_models": {SHA: "/models/m"},
    "tasks": ["text_classification"],
    "target_modules": ["query", "value"],
    "strategies": ["fedavg"],
    "max_rounds": 10,
    "max_upload_mb": 1.0,
    "hours": ["Mon-Fri 08:00-18:00"],
}
MONDAY_NOON = datetime(2026, 11, 23, 12)
FACTS = {
    "moment": MONDAY_NOON, "upload_bytes": 1_000_000, "total_epsilon": 5.0, "declared_units": 50_000
}  # fmt: skip
OPEN = {
    "privacy.epsilon": None, "privacy.delta": None, "privacy.clip": None, "privacy.mode": "none",
}  # fmt: skip

# clause, what breaks it in the plan, in the policy, in the facts, and the code
BREAKS = [
    ("require_privacy", OPEN, {}, {}, "ST-505"),
    ("allow_seeded_noise", {"plan.seed": 1}, {}, {}, "ST-506"),
    ("max_epsilon", {"privacy.epsilon": 2.001}, {}, {}, "ST-502"),
    ("max_total_epsilon", {}, {}, {"total_epsilon": 5.001}, "ST-503"),
    ("max_total_epsilon", {}, {}, {"total_epsilon": None}, "ST-503"),
    ("max_total_epsilon", {}, {}, {"total_epsilon": float("nan")}, "ST-503"),
    ("max_delta", {"privacy.delta": 1.1e-5}, {}, {}, "ST-504"),
    ("allow_large_delta", {}, {}, {"declared_units": 100_000}, "ST-519"),
    ("allow_large_delta", {}, {}, {"declared_units": None}, "ST-519"),
    ("require_secure_aggregation", {}, {"require_secure_aggregation": True}, {}, "ST-507"),
    ("min_cohort", {"rounds.min_sites": 2}, {}, {}, "ST-508"),
    ("base_models", {"model.sha256": "cd" * 32}, {}, {}, "ST-509"),
    ("base_models", {"model.sha256": None}, {}, {}, "ST-509"),
    ("tasks", {}, {"tasks": ["causal_lm"]}, {}, "ST-510"),
    ("target_modules", {"lora.target_modules": ["query", "dense"]}, {}, {}, "ST-511"),
    ("target_modules", {"lora.target_modules": "all-linear"}, {}, {}, "ST-511"),
    ("strategies", {}, {"strategies": ["other"]}, {}, "ST-512"),
    ("max_rounds", {"rounds.number": 11}, {}, {}, "ST-513"),
    ("max_upload_mb", {}, {}, {"upload_bytes": 1_000_001}, "ST-514"),
    ("max_upload_mb", {}, {}, {"upload_bytes": None}, "ST-514"),
    ("hours", {}, {}, {"moment": datetime(2026, 11, 22, 12)}, "ST-515"),
]
LEFT_OUT = {
    "max_epsilon": "ST-502", "max_total_epsilon": "ST-503", "max_delta": "ST-504",
    "require_secure_aggregation": "ST-507", "min_cohort": "ST-508", "base_models": "ST-509",
    "tasks": "ST-510", "target_modules": "ST-511", "strategies": "ST-512", "max_rounds": "ST-513",
    "max_upload_mb": "ST-514", "hours": "ST-515",
}  # fmt: skip


def policy(**changes):
    return PolicyConfig.model_validate_json(json.dumps({**POLICY, **changes}))


def verdict(plan=None, changed_policy=None, facts=None):
    chosen = Plan.from_mapping(PLAN).override(plan or {})
    return judge(policy(**(changed_policy or {})), chosen, Facts(**{**FACTS, **(facts or {})}))


def test_a_plan_at_every_limit_passes():
    found = verdict()
    assert found.allowed, found.refusals
    found.require()
    assert len({clause.name for clause in found.clauses}) == len(found.clauses) == 15


@pytest.mark.parametrize(("clause", "plan", "changed", "facts", "code"), BREAKS)
def test_the_broken_clause_and_no_other_refuses(clause, plan, changed, facts, code):
    found = verdict(plan, changed, facts)
    assert [c.name for c in found.refusals] == [clause]
    with pytest.raises(PolicyError) as error:
        found.require()
    assert error.value.code == code
    assert f"policy.{clause}: " in error.value.detail


@pytest.mark.parametrize(("clause", "code"), LEFT_OUT.items())
def test_a_clause_that_is_left_out_refuses(clause, code):
    written = {key: value for key, value in POLICY.items() if key != clause}
    found = judge(
        PolicyConfig.model_validate_json(json.dumps(written)),
        Plan.from_mapping(PLAN),
        Facts(**FACTS),
    )
    assert [(c.name, c.error.code) for c in found.refusals] == [(clause, code)]


def test_every_clause_has_a_test_that_breaks_it():
    assert {name for name, *_ in BREAKS} == {clause.name for clause in verdict().clauses}
    assert {name for name, *_ in BREAKS} == set(PolicyConfig.model_fields) - {"approval"}


def test_an_empty_policy_refuses_everything_it_can():
    found = judge(PolicyConfig(), Plan.from_mapping(PLAN), Facts(**FACTS))
    passed = {clause.name for clause in found.clauses if clause.allowed}
    # The plan is private, unseeded, and its delta is small.
    assert passed == {"require_privacy", "allow_seeded_noise", "allow_large_delta"}


def test_a_large_delta_passes_where_the_policy_says_so_in_so_many_words():
    found = verdict({}, {"allow_large_delta": True}, {"declared_units": 200_000})
    assert found.allowed
    (clause,) = [c for c in found.clauses if c.name == "allow_large_delta"]
    assert clause.reason == "delta 1e-05 is at or above 1/200000, and may be"


def test_a_refusal_names_all_clauses_that_refuse():
    found = verdict({"rounds.number": 11, "rounds.min_sites": 1}, {}, {"upload_bytes": None})
    with pytest.raises(errors.CohortBelowPolicy) as error:
        found.require()
    for name in ("min_cohort", "max_rounds", "max_upload_mb"):
        assert f"policy.{name}: " in error.value.detail


def test_what_has_no_privacy_needs_the_owners_word_for_it():
    assert verdict(OPEN, {"require_privacy": False}, {"total_epsilon": None}).allowed
    seeded = {"plan.seed": 1}
    assert verdict(seeded, {"allow_seeded_noise": True}).allowed


def test_hours_say_when_they_begin_next():
    sunday = datetime(2026, 11, 22, 12)
    clause = judge_moment(policy(), sunday)
    assert not clause.allowed
    assert "Mon 23 Nov at 08:00" in clause.reason
    assert judge_moment(policy(), MONDAY_NOON).allowed
