from __future__ import annotations

import json
import math
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.data.declared import new_secret, own_secret, rule_for, secret_for_a_look
from silotune.data.records import load_records
from silotune.data.site import DatasetConfig, Format, SiteConfig
from silotune.data.sources import read_dataset
from silotune.data.values import MISSING, canonical, canonical_column, text_of, without_missing
from silotune.plan.plan import Plan
from silotune.trust.vault import Vault
from tests.data.written import FIXED, TEXTS, VALUES, WRITERS, source_of
from tests.golden.registry import GOLDEN

OLD, NEW = bytes(range(32)), new_secret()


def test_every_format_is_in_the_table_or_fixed_by_a_standard():
    assert {*WRITERS, *FIXED} == set(get_args(Format))
    assert not FIXED & set(WRITERS)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_value_is_the_same_text_whatever_the_source(tmp_path, kind):
    entry = source_of(kind, tmp_path, VALUES)
    dataset = DatasetConfig.model_validate_json(
        json.dumps({**entry, "columns": {"text": "text"}, "declared_units": 50})
    )
    table = read_dataset(dataset, folder=tmp_path, columns=list(VALUES))
    assert {name: list(column) for name, column in table.columns.items()} == TEXTS
    assert table.faults.found == []


def plan_by(unit: str) -> Plan:
    return Plan.from_mapping(
        {
            "plan": {"name": "p", "purpose": "test"},
            "model": {"base": "b", "task": "text_classification", "labels": ["no", "1"]},
            "data": {"dataset": "notes"},
            "rounds": {"number": 2},
            "privacy": {"mode": "none", "unit": unit, "rate": 0.5},
        }
    )


def site_of(folder, kind, columns, **said) -> SiteConfig:
    dataset = {
        **source_of(kind, folder, columns),
        "unit": "patient",
        "declared_units": 50,
        "columns": {"text": "note", "label": "outcome", "unit": "patient"},
        **said,
    }
    return SiteConfig.from_mapping({"name": "s", "datasets": {"notes": dataset}}, folder=folder)


@pytest.mark.parametrize("secret", [OLD, NEW], ids=["old", "new"])
@pytest.mark.parametrize("kind", WRITERS)
def test_patients_without_a_number_are_left_out_and_no_patient_of_their_own(tmp_path, kind, secret):
    gap = float("nan")
    columns = {
        "note": [f"note {n}" for n in range(6)],
        "outcome": ["no", "no", "NULL", "no", "no", "no"],
        "patient": [gap, 1001.0, 1002.0, gap, 1003.0, gap],
    }
    records = load_records(
        site_of(tmp_path, kind, columns), plan_by("patient"), roles={"text", "label"}, secret=secret
    )
    assert [e["text"] for e in records.examples] == ["note 1", "note 4"]
    told = [str(part) for part in records.left_out]
    assert [t.split(" in ")[0] for t in told] == [
        "column 'outcome': empty label",
        "column 'patient': empty unit",
    ]
    assert [len(part.rows) for part in records.left_out] == [1, 3]


def test_the_same_records_are_the_same_to_a_plan_in_every_format(tmp_path):
    columns = {
        "note": [f"note {n}" for n in range(60)],
        "outcome": [float(n % 2) for n in range(60)],
        "patient": [1000.0 + n // 2 if n % 10 else None for n in range(60)],
    }
    plan = plan_by("patient").override({"model.labels": ["0", "1"]})
    found = {}
    for kind in WRITERS:
        (tmp_path / kind).mkdir()
        site = site_of(tmp_path / kind, kind, columns, max_records_per_unit=2)
        records = load_records(site, plan, roles={"text", "label"}, secret=NEW)
        assert len(records) == 54
        found[kind] = (records.content, records.split.tolist(), records.unit_of.tolist())
    assert len({json.dumps(value) for value in found.values()}) == 1


def test_a_site_that_was_trained_before_keeps_its_texts_and_may_say_otherwise(tmp_path):
    columns = {"note": ["a"], "outcome": ["no"], "patient": [1001.0]}
    site = site_of(tmp_path, "csv", columns)
    dataset = site.datasets["notes"]
    assert rule_for(dataset, OLD) == 1
    assert rule_for(dataset, NEW) == 2
    for rule in (1, 2):
        said = dataset.model_copy(update={"values": rule})
        assert rule_for(said, OLD) == rule_for(said, NEW) == rule
    for rule, text in ((1, "1001.0"), (2, "1001")):
        read = read_dataset(dataset, folder=tmp_path, columns=["patient"], rule=rule)
        assert list(read.columns["patient"]) == [text]


def test_under_the_second_rule_no_source_puts_a_unit_on_another_side():
    expected = json.loads((GOLDEN / "expected.json").read_text())
    sides: dict[str, set[str]] = {}
    for name, digits in expected["values_2"].items():
        sides.setdefault(name.split("-")[1], set()).add(digits)
    assert {name: len(found) for name, found in sides.items()} == dict.fromkeys(sides, 1)
    assert len(sides) == 7
    # And this is what it is for: under the first one, they were not.
    assert expected["values_1"]["csv-whole"] != expected["values_1"]["parquet-whole"]


@pytest.mark.parametrize(
    ("spelled", "text"),
    [
        ("1001.0", "1001"),
        (" 12.0 ", "12"),
        ("-3.0", "-3"),
        ("1.2345678E7", "12345678"),
        ("1e+16", "10000000000000000"),
        ("1.5E-7", "1.5e-07"),
        ("TRUE", "true"),
        ("False", "false"),
        ("2024-02-01 00:00:00", "2024-02-01"),
        ("2024-02-01 00:00:00.000000000", "2024-02-01"),
        ("2024-02-01T08:30:00.250", "2024-02-01T08:30:00.25"),
        ("2024-02-01 01:00:00.000000+0100", "2024-02-01T00:00:00Z"),
        ("2024-02-01T00:30:00-05", "2024-02-01T05:30:00Z"),
        # What no program writes for a value of its own is a code, or a text:
        ("007", "007"), ("012.0", "012.0"), ("1.50", "1.50"), ("250.00", "250.00"), ("1E5", "1E5"),
        ("2e10", "2e10"), ("tRUE", "tRUE"), ("yes", "yes"),
        ("2024-13-01 00:00:00", "2024-13-01 00:00:00"),
        ("2024-02-01 08:30", "2024-02-01 08:30"), ("3.0 mg", "3.0 mg"), ("  ", "  "), ("nan", "nan"),
    ],
)  # fmt: skip
def test_what_spells_a_value_is_its_one_text_and_other_text_stays(spelled, text):
    assert canonical(spelled) == text
    assert canonical(text) == text


@given(st.floats(allow_infinity=False))
def test_a_float_is_one_text_typed_or_written(value):
    typed = text_of(value)
    assert typed == ("" if math.isnan(value) else canonical(repr(value)))
    if typed:
        assert float(typed) == value
    assert text_of(typed) == typed


@given(
    st.datetimes(min_value=datetime(1800, 1, 1), max_value=datetime(2200, 1, 1)),
    st.integers(-14 * 4, 14 * 4),
)
def test_a_moment_is_one_text_whatever_the_offset_and_the_writer(moment, quarters):
    zoned = moment.replace(tzinfo=timezone(timedelta(minutes=15 * quarters)))
    assert text_of(zoned) == canonical(zoned.isoformat()) == canonical(str(zoned))
    assert text_of(moment) == canonical(moment.isoformat()) == canonical(f"{moment}")
    assert text_of(zoned) == text_of(zoned.astimezone(timezone(timedelta(hours=3))))


def test_what_is_missing_is_missing_unless_it_is_a_label():
    for value in (None, float("nan"), Decimal("NaN")):
        assert text_of(value) == text_of(value, 1) == ""
    assert without_missing(["NULL", "x", "NaT"]) == ["", "x", ""]
    assert "None" in MISSING
    for value in ([], {}, b"x", object()):
        assert text_of(value) is None


def test_a_label_that_is_a_word_for_nothing_is_a_label_where_it_is_declared(tmp_path):
    columns = {"note": ["a", "b", "c"], "outcome": ["None", "no", "NULL"], "patient": [1, 2, 3]}
    site = site_of(tmp_path, "csv", columns, labels=["None", "no"])
    plan = plan_by("patient").override({"model.labels": ["None", "no"]})
    records = load_records(site, plan, roles={"text", "label"}, secret=NEW)
    assert [e["label"] for e in records.examples] == ["None", "no"]


@given(
    st.lists(
        st.sampled_from(
            ["1001.0", " True", "\u00a02.0", "x", "", "007", "-0.0", "2024-02-01 00:00:00"]
        )
    )
)
def test_a_column_is_read_as_its_values_are(column):
    assert list(canonical_column(column)) == [canonical(text) for text in column]


def test_whoever_only_looks_reads_by_the_sites_rule_and_splits_otherwise(tmp_path):
    site = site_of(tmp_path, "csv", {"note": ["a"], "outcome": ["no"], "patient": [1001.0]})
    dataset = site.datasets["notes"]
    assert rule_for(dataset, secret_for_a_look(site, b"look")) == 2  # a site that begins
    for own, rule in ((OLD, 1), (NEW, 2)):
        state = site.model_copy(update={"state_dir": f"state{rule}"})
        state._folder = tmp_path
        own_secret(state.state_folder, Vault(state.state_folder), new=own)
        found = secret_for_a_look(state, b"look")
        assert rule_for(dataset, found) == rule
        assert own not in found
