"""Plans that count: what they can't stand beside, and what their readers are told."""

import tomllib

import pytest

from silotune.errors import PlanInvalid
from silotune.plan.counted import counted_parts
from silotune.plan.plan import Plan, plan_in_words
from tests.statistics_sites import PLAN, SECURE

RAW = tomllib.loads(PLAN)
TOKENS = {"statistics.lengths.counted": "tokens", "model.base": "public/tokenizer"}


def plan(**changes):
    return Plan.from_mapping(RAW).override(changes)


REFUSED = [
    ({"privacy.mode": "none"}, "privacy.mode: must be 'record'"),
    ({"privacy.rate": 0.5}, "privacy.rate: must be 1"),
    ({"privacy.rate": None, "privacy.batch": 10}, "privacy.rate: must be 1"),
    ({"privacy.clip": 2.0}, "privacy.clip: must be 1"),
    ({"privacy.clip": {"head": 1.0, "adapter": 1.0}}, "privacy.clip: must be 1"),
    ({"privacy.max_records_per_unit": 2}, "privacy.max_records_per_unit: must be 1"),
    ({"privacy.metrics_share": 0.1}, "privacy.metrics_share: must be 0"),
    ({"data.test_share": 0.2}, "data.test_share: must be 0"),
    ({"data.validation_share": 0.2}, "data.validation_share: must be 0"),
    ({"data.split_by": "group"}, "data.split_by: must be 'unit'"),
    ({"rounds.number": 2}, "rounds.number: must be 1"),
    ({"rounds.local_steps": 2}, "rounds.local_steps: must be 1"),
    ({"rounds.evaluate_every": 1}, "rounds.evaluate_every: must be 0"),
    ({"aggregation.strategy": "median", "aggregation.weights": "equal"}, "aggregation.strategy"),
    ({"aggregation.weights": "equal"}, "aggregation.weights: must be 'declared'"),
    ({"aggregation.head": "local"}, "aggregation.head: must be 'shared'"),
    ({"statistics": None}, "statistics: needed when model.task is 'statistics'"),
    ({"model.base": "some/model"}, "model.base: no model takes part in statistics"),
    ({"statistics.lengths.counted": "tokens"}, "model.base: needed for statistics.lengths.counted"),
    ({"model.sha256": "0" * 64}, "model.sha256: there is no model.base"),
    ({"statistics.lengths.edges": [4, 4]}, "statistics.lengths.edges: must rise"),
    ({"statistics.lengths.edges": [1.5]}, "statistics.lengths.edges: whole numbers from 1 on"),
    ({"statistics.records_a_unit": [0, 2]}, "statistics.records_a_unit: whole numbers"),
    ({"statistics.numbers.age.edges": [40, 18]}, "statistics.numbers.age.edges: must rise"),
    ({"statistics.numbers.age.edges": [200]}, "must lie between lower and upper"),
    ({"statistics.numbers.age.upper": -1.0}, "statistics.numbers.age.upper: must be above lower"),
    ({"statistics.numbers.age.upper": 1e300}, "statistics.numbers.age.upper: expected"),
    ({"statistics.lengths.edges": list(range(1, 10_100))}, "more than 10000 numbers"),
    ({"privacy.unit": "record"}, "statistics.records_a_unit: a unit is one record"),
    (
        {"model.labels": [], "statistics": {}},
        "statistics: nothing is counted",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_statistics_exclude_is_refused_by_name(changes, said):
    with pytest.raises(PlanInvalid) as error:
        plan(**changes)
    assert said in error.value.detail


def test_another_task_has_no_statistics_and_needs_a_model():
    raw = {**RAW, "model": {"task": "text_classification", "labels": ["a", "b"]}}
    with pytest.raises(PlanInvalid) as error:
        Plan.from_mapping(raw)
    assert "model.base: missing" in error.value.detail
    assert "statistics: only when model.task is 'statistics'" in error.value.detail


def test_a_plan_that_counts_is_the_same_after_its_canonical_text():
    for changes in ({}, SECURE, TOKENS):
        made = plan(**changes)
        again = Plan.from_canonical(made.canonical())
        assert again == made
        assert again.sha256 == made.sha256


def test_what_a_plan_asks_for_are_its_parts_and_no_others():
    names = [part.name for part in counted_parts(plan())]
    assert names == [
        "units", "labels", "records_a_unit", "lengths", "numbers.age.mean", "numbers.age.histogram",
    ]  # fmt: skip
    assert plan().roles == {"label", "text"}
    bare = plan(**{"model.labels": [], "statistics.lengths": None})
    assert bare.roles == frozenset()


def test_the_words_say_all_that_is_released_and_from_whom():
    words = dict(plan_in_words(plan()))
    told = words["Statistics"]
    for part in (
        "for each site by itself",
        "the number of patients",
        "how often each label occurs (asthma, gout, lupus)",
        "how many records a patient has, in 3 groups",
        "how long a text is, in words, in 4 groups",
        "the mean of age from 0 to 110 and how it is spread over 4 groups",
        "Each patient counts once",
        "fewer than about 20 patients",
        "No text, no model and no record leaves.",
    ):
        assert part in told
    assert words["Privacy"].startswith("At most epsilon 1 at delta 1e-5 for each patient; ")
    assert "gradient" not in " ".join(words.values())
    assert "for all sites together" in dict(plan_in_words(plan(**SECURE)))["Statistics"]
    assert "in tokens" in dict(plan_in_words(plan(**TOKENS)))["Statistics"]
