"""What is learned of records: several labels, a number, pairs of texts, from any source of a site."""

import csv
import json

import pytest

from silotune.data.checks import find_look_alikes
from silotune.data.records import Split, load_records
from silotune.data.site import SiteConfig
from silotune.errors import ColumnMissing, PlanInvalid, SiteConfigInvalid
from tests.models.model_material import a_plan

ROWS = [
    ("acute injury", "of the eye", "flu; cold", "0"),
    ("chronic pain", "left", "cold", "10"),
    ("a fracture", "right", "[]", "2.50"),
    ("a cut", "left", "flu;FLU", "-1"),
    ("a cough", "both", "", "many"),
    ("a cold", "both", "flu;gout", "nan"),
]


def site_of(folder, columns, kind="csv", **more):
    dataset = {
        "format": kind,
        "path": f"records.{kind}",
        "declared_units": 10,
        "columns": {"text": "note", **columns},
        **more,
    }
    return SiteConfig.from_mapping({"name": "north", "datasets": {"d": dataset}}, folder=folder)


def write_csv(folder, rows=ROWS):
    with (folder / "records.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["note", "more", "codes", "days"], *rows])


def write_jsonl(folder, rows):
    lines = [dict(zip(["note", "more", "codes", "days"], row, strict=True)) for row in rows]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def plan_of(task, **more):
    return a_plan("base", task, **{"data__test_share": 0.0, "data__validation_share": 0.0, **more})


def several(**more):
    return plan_of(
        "text_classification", model__labels=["cold", "flu"], model__multi_label=True, **more
    )


def loaded(site, plan):
    return load_records(site, plan, roles=plan.roles, secret=b"any")


def told(records):
    return {part.problem: len(part.rows) for part in records.left_out}


def test_several_labels_stand_in_one_text_between_separators(tmp_path):
    write_csv(tmp_path)
    site = site_of(tmp_path, {"labels": "codes"}, label_separator=";")
    records = loaded(site, several())
    assert [one["labels"] for one in records.examples] == ['["cold","flu"]', '["cold"]', "[]"]
    assert told(records) == {"a label that is not one of model.labels": 2, "empty labels": 1}


def test_labels_of_a_list_and_of_a_text_are_one_content(tmp_path):
    write_csv(tmp_path, ROWS[:3])
    write_jsonl(tmp_path, [(*row[:2], codes, row[3]) for row, codes in zip(
        ROWS, [["cold", "flu", "flu"], ["cold"], []], strict=False
    )])  # fmt: skip
    one = loaded(site_of(tmp_path, {"labels": "codes"}, label_separator=";"), several())
    other = loaded(site_of(tmp_path, {"labels": "codes"}, kind="jsonl"), several())
    assert one.content == other.content


def test_a_site_names_labels_and_says_what_any_other_is(tmp_path):
    write_csv(tmp_path)
    names = {"flu": "flu", "FLU": "flu", "cold": "cold", "*": ""}
    site = site_of(tmp_path, {"labels": "codes"}, label_separator=";", labels=names)
    records = loaded(site, several())
    assert [one["labels"] for one in records.examples] == [
        '["cold","flu"]', '["cold"]', "[]", '["flu"]', '["flu"]',
    ]  # fmt: skip


def test_a_value_beyond_the_range_of_the_plan_is_left_out_and_counted(tmp_path):
    write_csv(tmp_path)
    plan = plan_of("text_regression")
    records = loaded(site_of(tmp_path, {"value": "days"}), plan)
    assert [float(one["value"]) for one in records.examples] == [0.0, 10.0, 2.5]
    assert told(records) == {
        "empty value": 1,  # nan is a word for nothing
        "value is not a number": 1,
        "value is not within model.target": 1,
    }


def test_a_range_whose_width_is_no_number_is_refused():
    """No place in it could be told, and so a record beyond half of it would be an error."""
    with pytest.raises(PlanInvalid, match="too far apart"):
        plan_of("text_regression", model__target={"lower": -1e308, "upper": 1e308})


def test_a_pair_needs_both_texts_and_is_told_apart_by_both(tmp_path):
    write_csv(tmp_path, [("a", "b", "no", ""), ("a", "", "no", ""), ("a", "c", "yes", "")])
    plan = plan_of("pair_classification", data__test_share=0.5, plan__seed=None)
    site = site_of(tmp_path, {"text_b": "more", "label": "codes"})
    records = loaded(site, plan)
    assert [one["text_b"] for one in records.examples] == ["b", "c"]
    assert told(records) == {"empty text_b": 1}
    sides = {
        tuple(load_records(site, plan, roles=plan.roles, secret=bytes([n])).split)
        for n in range(40)
    }
    assert len(sides) == 4  # each pair has a side of its own
    with pytest.raises(ColumnMissing, match="text_b"):
        loaded(site_of(tmp_path, {"label": "codes"}), plan)


def test_versions_of_a_pair_are_of_both_texts(tmp_path):
    write_csv(tmp_path, [("one two three four", "five six seven eight nine", "no", "")])
    site = site_of(
        tmp_path, {"text_b": "more", "label": "codes"}, augmentation={"copies": 3, "drop": 0.4}
    )
    first, *versions = loaded(site, plan_of("pair_classification")).examples
    assert versions
    for version in versions:
        assert version["label"] == "no"
        assert {*version["text"].split()} <= {*first["text"].split()}
        assert {*version["text_b"].split()} <= {*first["text_b"].split()}
    assert any(v["text_b"] != first["text_b"] for v in versions)


def test_look_alikes_are_of_one_kind(tmp_path):
    rows = [(f"the same long note number {i % 2}", "", "", str(i % 2 * 9)) for i in range(60)]
    write_csv(tmp_path, rows)
    plan = plan_of("text_regression", data__test_share=0.4)
    site = site_of(tmp_path, {"value": "days", "unit": "number"}, unit="patient")
    with pytest.raises(ColumnMissing):
        loaded(site, plan)
    records = loaded(site_of(tmp_path, {"value": "days"}), plan)
    found = find_look_alikes(records, plan)
    assert found.compared == len(records.rows(Split.TEST))


@pytest.mark.parametrize(
    ("columns", "more", "problem"),
    [
        ({"label": "codes"}, {"label_separator": ";"}, "name that column"),
        ({"value": "{days} {more}"}, {}, "value is one column"),
        ({"labels": "{codes}"}, {}, "labels is one column"),
    ],
)
def test_columns_that_make_no_target_are_refused(tmp_path, columns, more, problem):
    with pytest.raises(SiteConfigInvalid) as caught:
        site_of(tmp_path, columns, **more)
    assert problem in str(caught.value)
