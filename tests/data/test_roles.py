"""What site.toml says of a dataset's columns, and what a plan sees of it."""

from __future__ import annotations

import csv

import pytest

from silotune.data.columns import pieces_of
from silotune.data.declared import new_secret
from silotune.data.records import Split, load_records
from silotune.data.site import SiteConfig
from silotune.errors import LabelsUnfit, SiteConfigInvalid
from silotune.plan.plan import Plan

HEADER = ["title", "note", "outcome", "patient", "part"]
SECRET = new_secret()


def plan_of(labels=("no", "yes"), **settings) -> Plan:
    plan = Plan.from_mapping(
        {
            "plan": {"name": "p", "purpose": "test"},
            "model": {"base": "b", "task": "text_classification", "labels": list(labels)},
            "data": {"dataset": "notes"},
            "rounds": {"number": 2},
            "privacy": {"mode": "none", "unit": "patient", "rate": 0.5},
        }
    )
    return plan.override({key.replace("__", "."): value for key, value in settings.items()})


def site_of(folder, rows, *, columns=None, **said) -> SiteConfig:
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])
    named = {"text": "note", "label": "outcome", "unit": "patient", **(columns or {})}
    dataset = {
        "format": "csv", "path": "t.csv", "unit": "patient", "declared_units": 50,
        "max_records_per_unit": 4, "columns": named, **said,
    }  # fmt: skip
    return SiteConfig.from_mapping({"name": "s", "datasets": {"notes": dataset}}, folder=folder)


def load(site, plan=None):
    return load_records(site, plan or plan_of(), roles={"text", "label"}, secret=SECRET)


def told(records) -> list[str]:
    return [str(part) for part in records.left_out]


OUTCOMES = ["1", "0", "9", "7", "", "no", "1.0", "NULL"]


def outcomes(values=OUTCOMES) -> list[list[str]]:
    return [["t", f"note {n}", value, f"p{n}", ""] for n, value in enumerate(values)]


def test_labels_get_the_plans_names_and_unwanted_records_are_left_out_by_the_sites_word(tmp_path):
    site = site_of(tmp_path, outcomes(), labels={"1": "yes", "0": "no", "9": ""})
    assert site.datasets["notes"].declared_labels == ("yes", "no")
    records = load(site)
    assert [(e["text"], e["label"]) for e in records.examples] == [
        ("note 0", "yes"), ("note 1", "no"), ("note 6", "yes"),
    ]  # fmt: skip
    # "no" is what a label is called here, and nothing that stands in this site's column.
    assert told(records) == [
        "column 'outcome': label is not among those that site.toml maps in 2 rows (5, 7)",
        "column 'outcome': label that site.toml leaves out in row 4",
        "column 'outcome': empty label in 2 rows (6, 9)",
    ]
    assert records.left_out[0].values == {"7": 1, "no": 1}


def test_several_values_may_mean_one_label_and_a_word_for_nothing_may_mean_one(tmp_path):
    rows = outcomes(["ja", "j", "nein", "None", "NULL"])
    site = site_of(tmp_path, rows, labels={"ja": "yes", "j": "yes", "nein": "no", "None": "no"})
    records = load(site)
    assert [e["label"] for e in records.examples] == ["yes", "yes", "no", "no"]


def test_a_plan_that_lacks_a_label_that_a_map_gives_is_refused_by_the_declaration(tmp_path):
    site = site_of(tmp_path, [], labels={"1": "yes", "2": "perhaps", "3": ""})
    (tmp_path / "t.csv").unlink()  # nobody looks at it
    with pytest.raises(LabelsUnfit, match="lacks 'perhaps', which labels of"):
        load(site)


def test_labels_that_are_one_value_are_refused_unless_texts_are_kept(tmp_path):
    rows = outcomes(["401", "401.0"])
    for labels in (["401", "401.0"], {"401": "no", "401.0": "yes"}):
        with pytest.raises(SiteConfigInvalid, match=r"'401' and '401.0' are one value; values = 1"):
            site_of(tmp_path, rows, labels=labels)
        site = site_of(tmp_path, rows, labels=labels, values=1)
        plan = plan_of(["401", "401.0"] if isinstance(labels, list) else ["no", "yes"])
        assert len({e["label"] for e in load(site, plan).examples}) == 2
    with pytest.raises(LabelsUnfit, match=r"'401' and '401.0' are one value"):
        load(site_of(tmp_path, rows), plan_of(["401", "401.0"]))


def test_labels_of_a_plan_are_found_however_they_are_spelled(tmp_path):
    rows = outcomes(["1.0", "TRUE", "1", "true"])
    records = load(site_of(tmp_path, rows), plan_of(["1", "True"]))
    assert [e["label"] for e in records.examples] == ["1", "True", "1", "True"]


def test_several_columns_are_one_text_as_the_site_puts_them_together(tmp_path):
    rows = [
        ["Letter", "is well", "no", "p1", ""],
        ["", "is ill", "no", "p2", ""],
        ["NULL", " ", "no", "p3", ""],
    ]
    site = site_of(tmp_path, rows, columns={"text": "{title}: {note} {{sic}}"})
    records = load(site)
    assert [e["text"] for e in records.examples] == ["Letter: is well {sic}", ": is ill {sic}"]
    assert told(records) == ["column '{title}: {note} {{sic}}': empty text in row 4"]


def test_a_name_with_a_brace_is_a_name_and_a_unit_is_one_column(tmp_path):
    assert pieces_of("note {") is None
    assert pieces_of("{{note}}") is None
    for role in ("label", "unit", "group", "split"):
        with pytest.raises(SiteConfigInvalid, match=f"{role} is one column"):
            site_of(tmp_path, [], columns={role: "{title}{note}"})


SIDES = ["train", "Training", "val", "DEV", "validation", "test", "x", ""]


def test_a_given_split_is_the_split(tmp_path):
    rows = [["t", f"note {n}", "no", f"p{n}", side] for n, side in enumerate(SIDES)]
    site = site_of(tmp_path, rows, columns={"split": "part"})
    records = load(site)
    expected = [Split.TRAIN] * 2 + [Split.VALIDATION] * 3 + [Split.TEST]
    assert records.split.tolist() == expected
    assert told(records) == [
        "column 'part': split is none of train, validation and test in row 8",
        "column 'part': empty split in row 9",
    ]
    assert records.content != load(site_of(tmp_path, rows)).content


def test_a_unit_stays_on_the_side_of_its_first_record(tmp_path):
    rows = [
        ["t", "a", "no", "p1", "test"],
        ["t", "b", "no", "p1", "train"],
        ["t", "c", "no", "p2", "train"],
    ]
    records = load(site_of(tmp_path, rows, columns={"split": "part"}))
    assert [e["text"] for e in records.examples] == ["a", "c"]
    assert told(records) == ["the unit has an earlier record on another side of the split in row 3"]
