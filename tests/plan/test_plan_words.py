"""A plan in words says what the plan says."""

import pytest

from silotune.plan.plan import Plan, plan_in_words

BASE = {
    "plan": {"name": "p", "purpose": "Why."},
    "model": {"base": "b", "task": "text_classification", "labels": ["x", "y", "z"]},
    "data": {"dataset": "d"},
    "rounds": {"number": 12},
    "privacy": {
        "mode": "record", "epsilon": 8.0, "delta": 1e-5, "clip": 2.0, "rate": 0.06,
    },
}  # fmt: skip


def words(**changes):
    return dict(plan_in_words(Plan.from_mapping(BASE).override(changes)))


def test_purpose_task_rounds_and_budget_are_there():
    found = words()
    assert found["Purpose"] == "Why."
    assert found["Model"] == "b, tuned to tell x, y and z apart by text."
    assert found["Rounds"].startswith("12 rounds of one step at each site, with at least 1 site ")
    assert found["Privacy"].startswith("At most epsilon 8 at delta 1e-5 for each record; ")


@pytest.mark.parametrize(
    ("changes", "heading", "expected"),
    [
        ({"plan.seed": 3}, "Privacy", "The noise is seeded, so the run is not private."),
        ({"privacy.metrics_share": 0.1}, "Privacy", "10% of it pays for noisy metrics."),
        ({"privacy.metrics_share": 0.004}, "Privacy", " 0.4% of it pays for noisy metrics."),
        ({"data.test_share": 0.125}, "Data", " 12.5% to test,"),
        ({"privacy.rate": None, "privacy.batch": 50}, "Privacy", "about 50 units"),
        ({"aggregation.strategy": "ffa"}, "Adapter", "Only B is trained"),
        ({"lora.last_layers": 3}, "Adapter", "in the last 3 layers"),
        ({"lora.target_modules": ["q", "v"]}, "Adapter", "on q and v."),
        ({"optimizer.site.head_rounds": 5}, "Rounds", "The first 5 train the head alone"),
        ({"rounds.local_steps": 4}, "Rounds", "12 rounds of 4 local steps"),
        ({"rounds.sites": 9}, "Rounds", "one step at each of 9 sites drawn for it"),
        ({"rounds.local_steps": 4}, "Optimizers", "Each site trains with adam"),
        ({"optimizer.server.lr": 0.5}, "Optimizers", "by Adam, scaled by 0.5;"),
        ({"aggregation.weights": "equal"}, "Aggregation", "every site weighing the same"),
        ({"data.split_by": "group"}, "Data", "with each group on one side only"),
    ],
)
def test_each_setting_changes_the_words(changes, heading, expected):
    assert expected in words(**changes)[heading]
    assert expected not in words()[heading]


def test_a_plan_without_privacy_says_so():
    plan = {**BASE, "privacy": {"mode": "none", "rate": 0.06}}
    assert dict(plan_in_words(Plan.from_mapping(plan)))["Privacy"].startswith("None: ")


def test_a_language_model_has_no_labels_and_no_head():
    plan = {**BASE, "model": {"base": "b", "task": "causal_lm"}}
    found = dict(plan_in_words(Plan.from_mapping(plan)))
    assert "answer a prompt" in found["Model"]
    assert "head" not in found["Optimizers"]
