"""The event schema: what is written can be read, by this version and by others."""

import json
from pathlib import Path

import jsonschema
import pytest

from silotune.commands.reference import events_page, json_schema
from silotune.errors import EventMalformed
from silotune.events.schema import KINDS, Event, RoundFinished, kind_of, parse
from silotune.rounds.run_directory import RunDirectory
from tests.simulation.synthetic_run import Synthetic

ROOT = Path(__file__).parents[2]


def example(model):
    """The least event of a kind: its required fields, by the JSON Schema's types."""
    plain = {"string": "x", "integer": 3, "number": 1.5, "array": ["a"], "object": {}}
    schema = model.model_json_schema()
    found = {}
    for name in schema["required"]:
        field = schema["properties"][name]
        found[name] = field.get("const") or field.get("enum", [None])[0] or plain[field["type"]]
    return found


@pytest.mark.parametrize("model", KINDS, ids=kind_of)
def test_an_event_comes_back_from_json_as_it_was(model):
    row = example(model)
    event = parse(json.loads(json.dumps(row)))
    assert type(event) is model
    assert event.as_dict() == row


@pytest.mark.parametrize("model", KINDS, ids=kind_of)
def test_json_schema_and_models_refuse_the_same_events(model):
    row = example(model)
    schema = jsonschema.Draft202012Validator(model.model_json_schema())
    assert schema.is_valid(row)
    for name in set(row) - {"event"}:
        broken = {key: value for key, value in row.items() if key != name}
        assert not schema.is_valid(broken)
        with pytest.raises(EventMalformed):
            parse(broken)


def test_fields_and_kinds_of_a_newer_version_are_kept():
    newer = {"time": 1.0, "event": "round_finished", "round": 2, "carbon_grams": 4}
    assert parse(newer).as_dict() == newer
    unknown = {"time": 1.0, "event": "site_teleported", "site": "north"}
    assert type(parse(unknown)) is Event
    assert parse(unknown).as_dict() == unknown


def test_an_event_can_not_be_changed():
    event = parse({"time": 1.0, "event": "round_finished", "round": 2})
    assert isinstance(event, RoundFinished)
    with pytest.raises(ValueError, match="frozen"):
        event.round = 3


def test_an_error_names_the_field_and_quotes_no_value():
    with pytest.raises(EventMalformed) as caught:
        parse({"time": 1.0, "event": "site_failed", "site": "north", "round": "patient 4711"})
    assert "round" in str(caught.value)
    assert "4711" not in str(caught.value)


def test_a_run_directory_refuses_what_is_not_of_the_schema(tmp_path):
    run = RunDirectory.create(tmp_path, "x", plan_toml="")
    with pytest.raises(EventMalformed):
        run.append_event("round_finished", seconds=1.0)
    with pytest.raises(EventMalformed, match="no such kind"):
        run.append_event("round_finnished", round=1)
    assert run.events.read() == []


def test_every_line_of_a_whole_simulation_is_of_the_schema(tmp_path):
    run = RunDirectory.open(Synthetic().write(tmp_path))
    rows = run.events.read()
    whole = jsonschema.Draft202012Validator(json_schema())
    one_of_each = {row["event"]: row for row in rows}
    assert all(whole.is_valid(row) for row in one_of_each.values())
    assert [parse(row).as_dict() for row in rows] == rows


def test_the_documentation_is_of_this_schema():
    assert (ROOT / "docs" / "events.md").read_text() == events_page()
