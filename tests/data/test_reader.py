from __future__ import annotations

import csv
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silotune.data.records import Split, assign, salt_for
from silotune.data.records import load_records as load
from silotune.data.site import SiteConfig
from silotune.errors import (
    ColumnMissing,
    DatasetUnknown,
    HeldOutTooMuch,
    LabelsUnfit,
    TooFewRecords,
    UnitMismatch,
)
from silotune.plan.plan import Plan

ROLES = {"text", "label"}
HEADER = ["note", "outcome", "patient", "ward"]
SECRET = "Mrs Smith has gout"


KEY = b"k" * 32
SALT = salt_for(seed=None, site="s", secret=KEY)
NONE = {"validation_share": 0.0, "salt": SALT}


def load_records(site, plan, *, roles):
    return load(site, plan, roles=roles, secret=KEY)


def left_out(records) -> list[str]:
    return [str(part) for part in records.left_out]


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
    records = load_records(site, plan_of(), roles=ROLES)
    names = dict.fromkeys(row[2] for row in rows)
    expected = assign(list(names), test_share=0.2, validation_share=0.1, salt=SALT)
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


def test_the_split_is_the_same_in_another_order_with_more_records(tmp_path):
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
    expected = assign([row[3] for row in rows], test_share=0.2, validation_share=0.1, salt=SALT)
    assert records.split.tolist() == expected.tolist()


def test_a_unit_in_two_groups_keeps_its_first_when_groups_are_kept_whole(tmp_path):
    rows = [["a", "no", "p1", "w1"], ["b", "no", "p2", "w1"], ["c", "no", "p1", "w2"]]
    records = load_records(site_of(tmp_path, rows), plan_of(data__split_by="group"), roles=ROLES)
    assert [example["text"] for example in records.examples] == ["a", "b"]
    assert left_out(records) == ["the unit has an earlier record in another group in row 4"]


def test_bad_rows_are_left_out_and_told_by_row_and_column(tmp_path):
    rows = [
        *many(2),
        ["", "no", "p8", "w"],
        [SECRET, "perhaps", "p9", "w"],
        ["x", "maybe", "", "w"],
        ["y", "maybe", "p7", "w"],
    ]
    records = load_records(site_of(tmp_path, rows), plan_of(), roles=ROLES)
    assert len(records) == 2
    assert records.rows_left_out == 4
    assert left_out(records) == [
        "column 'note': empty text in row 4",
        "column 'patient': empty unit in row 6",
        "column 'outcome': label is not one of model.labels in 2 rows (5, 7)",
    ]
    assert records.left_out[-1].values == {"perhaps": 1, "maybe": 1}


BROKEN = {
    "fields": ("csv", b'note,outcome,patient,ward\nx,no,p1,w\nonly one\ny,no,p2,w\n'),
    "bytes": ("csv", b'note,outcome,patient,ward\nx,no,p1,w\nM\xe9ni\xe8re,no,p3,w\ny,no,p2,w\n'),
    "quote": ("csv", b'note,outcome,patient,ward\nx,no,p1,w\ny,no,p2,w\n"z"z,no,p3,w\n'),
    "json": ("jsonl", b'{"note":"x","outcome":"no","patient":"p1"}\n{"note"\n'
                      b'{"note":"y","outcome":"no","patient":"p2"}\n'),
    "list": ("jsonl", b'{"note":"x","outcome":"no","patient":"p1"}\n'
                      b'{"note":["z"],"outcome":"no","patient":"p3"}\n'
                      b'{"note":"y","outcome":"no","patient":"p2"}\n'),
    "first": ("jsonl", b'\xfa\xfe\n{"note":"x","outcome":"no","patient":"p1"}\n'
                       b'{"note":"y","outcome":"no","patient":"p2"}\n'),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_record_that_cant_be_read_is_left_out_like_any_other(tmp_path, case):
    kind, content = BROKEN[case]
    (tmp_path / "r").write_bytes(content)
    dataset = {
        "format": kind, "path": "r", "unit": "patient", "declared_units": 50,
        "columns": {"text": "note", "label": "outcome", "unit": "patient"},
    }  # fmt: skip
    site = SiteConfig.from_mapping({"name": "s", "datasets": {"notes": dataset}}, folder=tmp_path)
    records = load_records(site, plan_of(), roles=ROLES)
    assert [example["text"] for example in records.examples] == ["x", "y"]
    assert records.rows_left_out == 1


def test_blank_text_is_empty_and_space_around_values_does_not_count(tmp_path):
    rows = [*many(40), ["  ", "no", "p", "w"]]
    records = load_records(site_of(tmp_path, rows), plan_of(), roles=ROLES)
    assert left_out(records) == ["column 'note': empty text in row 42"]
    rows = [
        [f" note {i}", " no ", f"p{i // 2} " if i % 2 else f"p{i // 2}", "w"] for i in range(40)
    ]
    records = load_records(site_of(tmp_path, rows), plan_of(), roles=ROLES)
    assert records.n_units() == 20
    assert records.examples[0] == {"text": "note 0", "label": "no"}


def test_a_unit_over_the_sites_bound_keeps_its_first_records(tmp_path):
    rows = [*many(20), *([SECRET, "no", "patient 3", "w"] for _ in range(3))]
    records = load_records(site_of(tmp_path, rows), plan_of(), roles=ROLES)
    assert np.bincount(records.unit_of).max() == 4
    assert left_out(records) == [
        "the unit has 4 earlier records, its max_records_per_unit in row 24"
    ]
    assert not load_records(site_of(tmp_path, rows, bound=5), plan_of(), roles=ROLES).left_out


def test_a_unit_over_the_plans_bound_keeps_all_records_for_the_steps_to_draw_from(tmp_path):
    crowd = [[f"long {i}", "no", "crowd", "w"] for i in range(10)]
    site = site_of(tmp_path, many(60) + crowd, bound=10)
    records = load_records(site, plan_of(privacy__max_records_per_unit=3), roles=ROLES)
    assert len(records) == 70
    assert np.bincount(records.unit_of).max() == 10


PRIVATE = {
    "privacy__mode": "record", "privacy__epsilon": 1.0, "privacy__delta": 1e-5, "privacy__clip": 1.0
}  # fmt: skip


def test_a_private_plan_with_another_unit_than_the_site_is_refused_by_both_names(tmp_path):
    with pytest.raises(
        UnitMismatch, match=r"by 'patient', but privacy.unit of the plan is 'record'"
    ):
        load_records(site_of(tmp_path, many(10)), by_record(**PRIVATE), roles=ROLES)


def test_a_plan_without_privacy_may_have_another_unit_and_patients_stay_whole(tmp_path):
    records = load_records(site_of(tmp_path, many(200)), by_record(), roles=ROLES)
    assert records.n_units() == 200
    assert (records.split[::2] == records.split[1::2]).all()  # two records a patient
    assert set(records.split.tolist()) == {0, 1, 2}


def test_what_a_plan_asks_of_a_dataset_is_judged_by_the_declaration_alone(tmp_path):
    site = site_of(tmp_path, many(10))
    (tmp_path / "records.csv").unlink()  # nobody looks at it
    notes = site.datasets["notes"]

    def declaring(**changed):
        dataset = notes.model_copy(update=changed)
        return site.model_copy(update={"datasets": {"notes": dataset}})

    with pytest.raises(LabelsUnfit, match="lacks 'perhaps', which labels of"):
        load_records(declaring(labels=("no", "perhaps")), plan_of(), roles=ROLES)
    with pytest.raises(HeldOutTooMuch, match=r"holds out 0.6, max_held_out of the dataset is 0.5"):
        load_records(site, plan_of(data__test_share=0.5), roles=ROLES)
    with pytest.raises(TooFewRecords, match="of 1 declared units"):
        load_records(declaring(declared_units=1), plan_of(), roles=ROLES)


def test_a_label_that_the_site_does_not_declare_is_left_out(tmp_path):
    site = site_of(tmp_path, many(30))
    dataset = site.datasets["notes"].model_copy(update={"labels": ("no",)})
    site = site.model_copy(update={"datasets": {"notes": dataset}})
    site._folder = tmp_path
    records = load_records(site, plan_of(), roles=ROLES)
    assert {example["label"] for example in records.examples} == {"no"}
    assert records.left_out[0].values == {"yes": 20}


def test_the_content_tells_records_apart_and_the_fingerprint_needs_the_secret(tmp_path):
    first = load_records(site_of(tmp_path, many(10)), plan_of(), roles=ROLES)
    other = load_records(site_of(tmp_path, many(9)), plan_of(), roles=ROLES)
    again = load_records(site_of(tmp_path, many(10)), plan_of(), roles=ROLES)
    assert first.content == again.content != other.content
    assert first.fingerprint(KEY) == again.fingerprint(KEY) != first.fingerprint(b"guess")
    assert first.content not in first.fingerprint(KEY)


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


def test_no_records_and_empty_sides_are_no_errors(tmp_path):
    records = load_records(site_of(tmp_path, []), plan_of(), roles=ROLES)
    assert len(records) == records.n_units() == 0
    name = next(n for n in map(str, range(50)) if assign([n], test_share=0.5, **NONE)[0])
    plan = plan_of(data__test_share=0.5, data__validation_share=0.0)
    records = load_records(site_of(tmp_path, [["x", "no", name, "w"]]), plan, roles=ROLES)
    assert records.split.tolist() == [Split.TEST]


def test_instructions_are_split_by_prompt_and_response(tmp_path):
    """One prompt for all records leaves none of them alone on its side; equal records stay together."""
    rows = [["the question", f"answer {i % 100}", "", ""] for i in range(200)]
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
    assert records.examples[3] == {"prompt": "the question", "response": "answer 3"}
    assert records.split[:100].tolist() == records.split[100:].tolist()
    # Of 100 different records a fifth is held out for testing; all on one side: under 1e-9.
    assert {Split.TRAIN, Split.TEST} <= set(records.split.tolist())


def test_four_thousand_rows_load_in_well_under_a_third_of_a_second(tmp_path):
    site, plan = site_of(tmp_path, many(4000)), plan_of()
    best = min(_seconds(site, plan) for _ in range(3))
    assert best < 0.15  # seconds of processor time; 0.03 on a core of 2025


def _seconds(site: SiteConfig, plan: Plan) -> float:
    start = time.process_time()
    records = load_records(site, plan, roles=ROLES)
    assert records.n_units(Split.TRAIN) > 1000
    return time.process_time() - start
