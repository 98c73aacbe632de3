from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, model_validator

from silotune.plan.explain import explain, key_paths
from silotune.plan.plan import Plan

VALID = {
    "plan": {"name": "x", "purpose": "p"},
    "model": {"base": "b", "task": "text_classification", "labels": ["a", "b"]},
    "data": {"dataset": "d"},
    "rounds": {"number": 3},
    "privacy": {
        "mode": "record",
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip": {"head": 2.0, "adapter": 2.0},
        "rate": 0.06,
    },
}


def complaints(key: str, value: object) -> list[str]:
    """What is said about a valid plan with one dotted key changed."""
    raw = json.loads(json.dumps(VALID))
    *parents, leaf = key.split(".")
    table = raw
    for part in parents:
        table = table.setdefault(part, {})
    table[leaf] = value
    with pytest.raises(ValidationError) as caught:
        Plan.model_validate_json(json.dumps(raw))
    return explain(caught.value, Plan)


def test_an_unknown_key_gets_the_nearest_one_beside_it():
    assert complaints("privacy.epsilonn", 3) == [
        "privacy.epsilonn: unknown key; did you mean 'epsilon'?"
    ]


def test_an_unknown_key_inside_a_member_of_a_union_is_found_there():
    assert complaints("privacy.clip.heat", 2.0) == [
        "privacy.clip.heat: unknown key; did you mean 'head'?"
    ]


def test_a_key_in_the_wrong_table_is_sent_to_the_right_one():
    said = complaints("privacy.local_stepz", 1)
    assert said == ["privacy.local_stepz: unknown key; did you mean 'rounds.local_steps'?"]


def test_a_key_like_no_other_gets_the_list_of_known_ones():
    (said,) = complaints("data.qqqq", 1)
    assert said.startswith("data.qqqq: unknown key; known here: dataset, max_length,")


def test_the_alternatives_of_a_union_are_one_line_and_name_no_python_type():
    assert complaints("privacy.clip", -1) == [
        "privacy.clip: expected greater than 0 or a table, got -1"
    ]
    assert complaints("lora.target_modules", "bla") == [
        "lora.target_modules: expected 'auto', 'all-linear' or 'none' or a list, got 'bla'"
    ]


def test_the_place_inside_a_list_is_told():
    assert complaints("model.labels", [1, "b"]) == [
        "model.labels.0: expected a valid string, got 1"
    ]


def test_a_missing_key_and_a_contradiction_are_told_by_path():
    assert complaints("rounds", {}) == ["rounds.number: missing, and it has no default"]
    assert complaints("model.labels", ["a", "a"]) == ["model.labels: a label is listed twice"]


class Access(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    key: SecretStr | None = None
    width: int = 1

    @model_validator(mode="after")
    def _wide(self) -> Access:
        if self.width == 0:
            raise ValueError("too narrow\nand no way round")
        return self


class House(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    doors: dict[str, Access]


def said_of(raw: object) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        House.model_validate_json(json.dumps(raw))
    return explain(caught.value, House)


def test_keys_below_a_mapping_are_found():
    assert said_of({"doors": {"front": {"widht": 1}}}) == [
        "doors.front.widht: unknown key; did you mean 'width'?"
    ]
    assert key_paths(House) == ["doors", "doors.NAME.key", "doors.NAME.width"]


def test_a_contradiction_inside_a_table_has_its_path_on_every_line():
    assert said_of({"doors": {"front": {"width": 0}}}) == [
        "doors.front: too narrow",
        "doors.front: and no way round",
    ]


def test_a_secret_is_not_quoted_and_another_value_is():
    said = said_of({"doors": {"front": {"key": 12345, "width": "w"}}})
    assert said == [
        "doors.front.key: expected a valid string",
        "doors.front.width: expected a valid integer, got 'w'",
    ]
