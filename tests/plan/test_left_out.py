"""What an author leaves out follows from the rest, once; what is stored means what it says for ever."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.errors import PlanInvalid
from silotune.plan.left_out import MOST_CURVED_LABELS, PUBLIC_TEXTS, left_out
from silotune.plan.plan import Plan, dotted
from silotune.plan.rules import conflicts
from tests.golden.registry import GOLDEN

REQUIRED = {
    "plan": {"name": "least", "purpose": "As little as a private plan can say."},
    "model": {"base": "x", "task": "text_classification", "labels": ["a", "b"]},
    "data": {"dataset": "notes"},
    "rounds": {"number": 120},
    "privacy": {
        "mode": "record",
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip": {"head": 2.0, "adapter": 2.0},
        "rate": 0.12,
    },
}
CAUSAL = {
    **REQUIRED,
    "model": {"base": "x", "task": "causal_lm"},
    "rounds": {"number": 40},
    "privacy": {**REQUIRED["privacy"], "clip": 1.0},
}


def as_toml(tables):
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        for key, value in table.items():
            if isinstance(value, dict):
                inner = ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items())
                lines.append(f"{key} = {{ {inner} }}")
            else:
                lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines)


def read(folder, tables=REQUIRED, **changes):
    path = folder / "plan.toml"
    path.write_text(as_toml(tables))
    return Plan.load(path, changes)


def found(tables, **changes):
    numbers = left_out(Plan.from_mapping(tables).override(changes))
    return {number.key: number.value for number in numbers}


def test_a_plan_of_required_keys_trains_a_head_of_cosines_at_a_rate_that_fits(tmp_path):
    plan = read(tmp_path)
    assert plan.optimizer.site.head_rounds == 120
    assert plan.optimizer.site.head_lr == 0.083
    assert plan.model.head_features is not None
    assert plan.model.head_features.number == 2048
    assert plan.model.centre_texts == PUBLIC_TEXTS
    assert plan.lora.r == 1  # of an adapter that stays at its start


@pytest.mark.parametrize(("rounds", "rate"), [(10, 0.1), (120, 0.083), (340, 0.03), (4000, 0.03)])
def test_the_heads_rate_falls_with_the_rounds(tmp_path, rounds, rate):
    assert read(tmp_path, **{"rounds.number": rounds}).optimizer.site.head_lr == rate


def test_the_adapters_rate_follows_from_rounds_rank_and_noise(tmp_path):
    """Ten times the constant of before, at which a causal model on 900 definitions learned nothing."""
    rates = {
        (rank, rounds): read(
            tmp_path, CAUSAL, **{"lora.r": rank, "lora.alpha": 2.0 * rank, "rounds.number": rounds}
        ).optimizer.site.adapter_lr
        for rank in (2, 8, 32)
        for rounds in (40, 160)
    }
    assert 0.008 < rates[8, 40] < 0.02
    assert rates[2, 40] > rates[8, 40] > rates[32, 40]
    assert rates[8, 40] == pytest.approx(2 * rates[8, 160], rel=0.1)


@pytest.mark.parametrize(("rounds", "rate"), [(3, 0.02), (10, 0.01), (40, 0.0025), (120, 0.002)])
def test_without_privacy_a_language_models_rate_falls_with_the_rounds_and_no_others(
    tmp_path, rounds, rate
):
    clear = {"privacy": {"mode": "none", "rate": 0.1}, "rounds": {"number": rounds}}
    assert read(tmp_path, {**CAUSAL, **clear}).optimizer.site.adapter_lr == rate
    classes = read(tmp_path, {**REQUIRED, **clear, "lora": {"r": 2}})
    assert classes.optimizer.site.adapter_lr == 0.002


@pytest.mark.parametrize(
    ("changes", "curved"),
    [
        ({}, True),
        ({"data.split_by": "group"}, False),
        ({"model.labels": [str(n) for n in range(MOST_CURVED_LABELS)]}, True),
        ({"model.labels": [str(n) for n in range(MOST_CURVED_LABELS + 1)]}, False),
        ({"lora.r": 4}, False),
        ({"optimizer.site.head_rounds": 60}, False),
        ({"aggregation.strategy": "rolora"}, False),
    ],
)
def test_cosines_are_for_few_labels_records_like_those_trained_on_and_no_adapter(changes, curved):
    assert ("model.head_features" in found(REQUIRED, **changes)) == curved


PAIRS = {**REQUIRED, "model": {**REQUIRED["model"], "task": "pair_classification"}}


def test_a_private_plan_of_pairs_trains_a_small_adapter_in_half_of_its_rounds(tmp_path):
    plan = read(tmp_path, PAIRS)
    assert plan.optimizer.site.head_rounds == 60
    assert (plan.lora.r, plan.lora.alpha) == (2, 4.0)
    assert plan.model.head_features is None
    said = {"lora.r": 2, "lora.alpha": 4.0, "optimizer.site.head_rounds": 60}
    shaped = read(tmp_path, PAIRS, **said)
    assert plan.optimizer.site.adapter_lr == shaped.optimizer.site.adapter_lr  # of that shape


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora.r": 4}, {"optimizer.site.head_rounds": 60}),
        ({"lora.target_modules": "none"}, {}),
        ({"optimizer.site.head_rounds": 120}, {"lora.r": 1}),
        ({"rounds.number": 1}, {"optimizer.site.head_rounds": 0, "lora.r": 2, "lora.alpha": 4.0}),
    ],
)
def test_of_pairs_no_more_is_filled_in_than_was_left_out(changes, expected):
    numbers = found(PAIRS, **changes)
    shape = ("optimizer.site.head_rounds", "lora.r", "lora.alpha", "model.head_features")
    assert {key: numbers[key] for key in shape if key in numbers} == expected


def test_what_the_author_says_is_left_alone(tmp_path):
    said = {
        "optimizer.site.head_lr": 0.5,
        "optimizer.site.adapter_lr": 0.25,
        "optimizer.site.head_rounds": 7,
        "model.centre_texts": ["eye"],
    }
    plan = read(tmp_path, **said)
    assert plan == Plan.from_mapping(REQUIRED).override(said)
    assert left_out(plan) == ()


def test_settings_of_the_command_line_are_the_authors_word(tmp_path):
    """Fewer rounds give another rate, and never more head rounds than there are."""
    plan = read(tmp_path, **{"rounds.number": 20})
    assert plan.optimizer.site.head_rounds == 20
    assert plan.optimizer.site.head_lr == 0.1


def test_what_was_read_is_all_said_and_its_text_needs_no_rule(tmp_path):
    plan = read(tmp_path)
    assert left_out(plan) == ()
    assert '"head_lr":0.083' in plan.canonical()
    assert Plan.from_canonical(plan.canonical()) == plan
    assert plan.override({"privacy.epsilon": 3.0}).optimizer == plan.optimizer


@pytest.mark.parametrize("path", sorted((GOLDEN / "plans").glob("*.signed.json")))
def test_a_stored_plan_takes_no_rule(path):
    """Neither when it is read nor when a simulation's comparison changes a key of it."""
    text = json.loads(path.read_text())["plan"]
    plan = Plan.from_canonical(text)
    assert plan.canonical() == text
    changed = plan.override({"plan.purpose": "another"})
    differing = {
        key
        for key, value in dotted(changed.written()).items()
        if dotted(plan.written())[key] != value
    }
    assert differing == {"plan.purpose"}


def test_a_file_of_an_earlier_time_gives_a_plan_of_now(tmp_path):
    """Its signed text is as it was; read again, the file is a new plan, with another hash."""
    path = GOLDEN / "plans" / "bare.toml"
    signed = json.loads((GOLDEN / "plans" / "bare.signed.json").read_text())["plan"]
    assert Plan.written_in(path).canonical() == signed
    assert Plan.load(path).sha256 != Plan.written_in(path).sha256


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_rule_contradicts_the_rest_of_any_plan(data):
    pick = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    tables = {**REQUIRED, "rounds": {"number": data.draw(st.integers(1, 500))}}
    tables |= {"aggregation": {"strategy": pick("fedavg", "ffa", "rolora", "fedsvd", "norm_bound")}}
    if tables["aggregation"]["strategy"] == "norm_bound":
        tables["aggregation"]["bound"] = 1.0
    tables["aggregation"]["head"] = pick("shared", "local")
    tables["rounds"]["local_steps"] = pick(1, 1, 1, 4)
    tables["data"] = {"dataset": "notes", "split_by": pick("unit", "group")}
    asked = pick("one text", "two texts", "causal")
    if asked == "two texts":
        tables["model"] = PAIRS["model"]
    if asked == "causal":
        tables["model"] = CAUSAL["model"]
        tables["privacy"] = CAUSAL["privacy"]
    if pick(True, False):
        tables["privacy"] = {"mode": "none", "rate": 0.1}
    tables["optimizer"] = {"server": {"name": pick("sgd", "adam")}}
    if pick(True, False):
        tables["privacy"] = {
            **tables["privacy"],
            "rate": 0.05,
            "bands": data.draw(st.integers(2, 9)),
        }
    try:
        written = Plan.from_mapping(tables)
    except PlanInvalid:  # a combination that no plan can have
        return
    numbers = left_out(written)
    whole = written.completed(numbers, source="plan")
    assert conflicts(whole) == []
    assert left_out(whole) == ()
    assert all(number.why for number in numbers)


def test_the_example_says_every_number():
    example = Path(__file__).parents[2] / "examples" / "plan.toml"
    assert left_out(Plan.from_mapping(tomllib.loads(example.read_text()))) == ()
