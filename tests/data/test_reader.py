from __future__ import annotations

import csv
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silotune.data.errors import UnitMismatch, UnitTooLarge
from silotune.data.reader import load_records
from silotune.data.site import SiteConfig
from silotune.data.splits import Split, assign
from silotune.errors import ColumnMissing, DatasetUnknown, RecordInvalid, TooFewRecords
from silotune.plan import Plan

ROLES = {"text", "label"}
HEADER = ["note", "outcome", "patient", "ward"]
SECRET = "Mrs Smith has gout"


def plan_of(**settings_) -> Plan:
    raw = {
        "plan": {"name": "p", "purpose": "test"},
        "model": {"base": "b", "task": "text_classification", "labels": ["no", "yes"]},
        "data": {"dataset": "notes"},
        "rounds": {"number": 2},
        "privacy": {"mode": "none", "unit": "patient", "rate": 0.5, "max_records_per_unit": 4},
    }
    plan = Plan.from_mapping(raw)
    return plan.override({key.replace("__", "."): value for key, value in settings_.items()})


def by_record(**settings_) -> Plan:
    return plan_of(privacy__unit="record", privacy__max_records_per_unit=1, **settings_)


def site_of(folder, rows, *, unit: str = "patient", bound: int = 4, **columns) -> SiteConfig:
    with (folder / "records.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])
    named = {"text": "note", "label": "outcome", "group": "ward", **columns}
    if unit != "record":
        named.setdefault("unit", "patient")
    dataset = {
        "format": "csv",
        "path": "records.csv",
        "unit": unit,
        "declared_units": 50,
        "max_records_per_unit": bound if unit != "record" else 1,
        "columns": named,
    }
    return SiteConfig.from_mapping({"name": "s", "datasets": {"notes": dataset}}, folder=folder)


def many(number: int) -> list[list[str]]:
    return [
        [f"note {i}", "yes" if i % 3 else "no", f"patient {i // 2}", f"ward {i // 20}"]
        for i in range(number)
    ]


def test_records_carry_the_roles_in_the_order_of_the_file(tmp_path):
    records = load_records(site_of(tmp_path, many(100)), plan_of(), roles=ROLES)
    frame = pd.read_csv(tmp_path / "records.csv", dtype=str)
    assert [dict(example) for example in records.examples] == [
        {"text": note, "label": outcome}
        for note, outcome in zip(frame["note"], frame["outcome"], strict=True)
    ]
    assert records.unit_of.tolist() == pd.factorize(frame["patient"])[0].tolist()
    assert records.n_units() == frame["patient"].nunique() == 50


words = st.sampled_from([f"w{i}" for i in range(12)])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(words, st.sampled_from(["yes", "no"]), words, words), min_size=1))
def test_no_unit_is_on_both_sides_and_each_is_where_its_name_says(tmp_path, rows):
    site = site_of(tmp_path, rows, bound=1000)
    try:
        records = load_records(site, plan_of(), roles=ROLES)
    except TooFewRecords:
        return
    names = dict.fromkeys(row[2] for row in rows)
    expected = assign(list(names), test_share=0.2, validation_share=0.1)
    assert records.n_units() == len(names)
    for unit, side in enumerate(expected):
        assert set(records.split[records.unit_of == unit].tolist()) == {side}


def test_equal_texts_are_on_one_side_where_records_are_the_units(tmp_path):
    rows = [[f"note {i % 30}", "no", "", ""] for i in range(300)]
    site = site_of(tmp_path, rows, unit="record", group=None)
    records = load_records(site, by_record(), roles=ROLES)
    assert records.n_units() == 300
    sides = pd.Series(records.split).groupby([e["text"] for e in records.examples]).nunique()
    assert (sides == 1).all()
    assert set(records.split.tolist()) == {0, 1, 2}


def test_the_split_is_the_same_in_another_order_at_another_site(tmp_path):
    sides: list[dict[str, int]] = []
    for name, rows in (("a", many(120)), ("b", many(150)[::-1])):
        (tmp_path / name).mkdir()
        records = load_records(site_of(tmp_path / name, rows), plan_of(), roles=ROLES)
        texts = [example["text"] for example in records.examples]
        sides.append(dict(zip(texts, records.split.tolist(), strict=True)))
    assert sides[0].items() <= sides[1].items()


def test_groups_are_kept_whole_when_the_plan_splits_by_group(tmp_path):
    rows = many(400)
    records = load_records(site_of(tmp_path, rows), plan_of(data__split_by="group"), roles=ROLES)
    expected = assign([row[3] for row in rows], test_share=0.2, validation_share=0.1)
    assert records.split.tolist() == expected.tolist()


def test_a_unit_in_two_groups_is_refused_when_groups_are_kept_whole(tmp_path):
    rows = [["a", "no", "p1", "w1"], ["b", "no", "p2", "w1"], ["c", "no", "p1", "w2"]]
    with pytest.raises(RecordInvalid, match="in another group, so it can't stay whole in row 4"):
        load_records(site_of(tmp_path, rows), plan_of(data__split_by="group"), roles=ROLES)


def test_bad_rows_are_told_by_row_and_column_and_never_shown(tmp_path):
    rows = [
        *many(2),
        ["", "no", "p8", "w"],
        [SECRET, "perhaps", "p9", "w"],
        ["x", "maybe", "", "w"],
    ]
    with pytest.raises(RecordInvalid) as caught:
        load_records(site_of(tmp_path, rows), plan_of(), roles=ROLES)
    said = caught.value.detail
    assert str(tmp_path / "records.csv") in said
    assert "column 'note': empty text in row 4" in said
    assert "column 'outcome': label is not one of model.labels in 2 rows (5, 6)" in said
    assert "column 'patient': empty unit in row 6" in said
    assert not any(word in said for word in (SECRET, "perhaps", "maybe", "p9"))


def test_blank_text_is_empty_and_space_around_values_does_not_count(tmp_path):
    rows = [*many(40), ["  ", "no", "p", "w"]]
    with pytest.raises(RecordInvalid, match="empty text in row 42"):
        load_records(site_of(tmp_path, rows), plan_of(), roles=ROLES)
    rows = [
        [f" note {i}", " no ", f"p{i // 2} " if i % 2 else f"p{i // 2}", "w"] for i in range(40)
    ]
    records = load_records(site_of(tmp_path, rows), plan_of(), roles=ROLES)
    assert records.n_units() == 20
    assert records.examples[0] == {"text": "note 0", "label": "no"}


def test_a_unit_over_the_sites_bound_is_told_by_row(tmp_path):
    rows = [*many(20), *([SECRET, "no", "patient 3", "w"] for _ in range(3))]
    with pytest.raises(UnitTooLarge, match=r"1 of the units .* more than 4 .* row 8") as caught:
        load_records(site_of(tmp_path, rows), plan_of(), roles=ROLES)
    assert "patient 3" not in caught.value.detail
    load_records(site_of(tmp_path, rows, bound=5), plan_of(), roles=ROLES)


def test_a_unit_over_the_plans_bound_keeps_all_records_for_the_steps_to_draw_from(tmp_path):
    crowd = [[f"long {i}", "no", "crowd", "w"] for i in range(10)]
    site = site_of(tmp_path, many(60) + crowd, bound=10)
    records = load_records(site, plan_of(privacy__max_records_per_unit=3), roles=ROLES)
    assert len(records) == 70
    assert np.bincount(records.unit_of).max() == 10


def test_a_plan_with_another_unit_than_the_site_is_refused(tmp_path):
    with pytest.raises(
        UnitMismatch, match=r"by 'patient', but privacy.unit of the plan is 'record'"
    ):
        load_records(site_of(tmp_path, many(10)), by_record(), roles=ROLES)


def test_missing_datasets_roles_and_columns_are_told(tmp_path):
    with pytest.raises(DatasetUnknown):
        load_records(site_of(tmp_path, many(10)), plan_of(data__dataset="x"), roles=ROLES)
    with pytest.raises(ColumnMissing, match="roles prompt, response, for which"):
        load_records(site_of(tmp_path, many(10)), plan_of(), roles={"prompt", "response"})
    site = site_of(tmp_path, many(10), group=None)
    with pytest.raises(ColumnMissing, match="the roles group"):
        load_records(site, plan_of(data__split_by="group"), roles=ROLES)
    with pytest.raises(ColumnMissing, match="no column 'remark'"):
        load_records(site_of(tmp_path, many(10), text="remark"), plan_of(), roles=ROLES)


def test_no_records_and_no_training_records_are_told(tmp_path):
    with pytest.raises(TooFewRecords, match="no records"):
        load_records(site_of(tmp_path, []), plan_of(), roles=ROLES)
    rows = [row for row in many(100) if assign([row[2]], test_share=0.5, validation_share=0.0)[0]]
    plan = plan_of(data__test_share=0.5, data__validation_share=0.0)
    with pytest.raises(TooFewRecords, match="no record is left for training"):
        load_records(site_of(tmp_path, rows), plan, roles=ROLES)


def test_instructions_are_split_by_their_prompt(tmp_path):
    rows = [[f"question {i % 20}", f"answer {i}", "", ""] for i in range(200)]
    site = site_of(
        tmp_path, rows, unit="record", text=None, label=None, group=None,
        prompt="note", response="outcome",
    )  # fmt: skip
    plan = Plan.from_mapping(
        {
            "plan": {"name": "p", "purpose": "test"},
            "model": {"base": "b", "task": "causal_lm"},
            "data": {"dataset": "notes"},
            "rounds": {"number": 1},
            "privacy": {"mode": "none", "rate": 0.5},
        }
    )
    records = load_records(site, plan, roles={"prompt", "response"})
    assert records.examples[3] == {"prompt": "question 3", "response": "answer 3"}
    sides = pd.Series(records.split).groupby([e["prompt"] for e in records.examples]).nunique()
    assert (sides == 1).all()


def test_four_thousand_rows_load_in_well_under_a_third_of_a_second(tmp_path):
    site, plan = site_of(tmp_path, many(4000)), plan_of()
    best = min(_seconds(site, plan) for _ in range(3))
    assert best < 0.15  # seconds of processor time; 0.03 on a core of 2025


def _seconds(site: SiteConfig, plan: Plan) -> float:
    start = time.process_time()
    records = load_records(site, plan, roles=ROLES)
    assert records.n_units(Split.TRAIN) > 1000
    return time.process_time() - start
