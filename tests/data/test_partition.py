from __future__ import annotations

import csv
import gzip
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silotune.data.partition import (
    ByColumn,
    DirichletLabels,
    Iid,
    QuantitySkew,
    Units,
    partition_file,
)
from silotune.data.records import load_records
from silotune.data.site import BudgetConfig, load_sites
from silotune.data.table import Table
from silotune.errors import (
    ColumnMissing,
    DatasetUnreadable,
    FolderOccupied,
    RecordInvalid,
    TooFewRecords,
)
from silotune.plan.plan import Plan

BUDGET = BudgetConfig(epsilon=8.0, delta=1e-5)
COLUMNS = {"text": "note", "label": "outcome"}
BY_PATIENT = {**COLUMNS, "unit": "patient"}


def write_file(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["note", "outcome", "patient", "clinic"], *rows])
    return path


def rows_of(number: int, *, labels: int = 2) -> list[list[str]]:
    return [
        [f"note {i}", f"l{i % labels}", f"p{i // 3}", f"Clinic {i // 7 % 4}"] for i in range(number)
    ]


def divide(tmp_path, rows, partitioner, *, columns=COLUMNS, seed=0, name="sites"):
    source = write_file(tmp_path / "all.csv", rows)
    unit = "patient" if "unit" in columns else "record"
    return partition_file(
        source, tmp_path / name, partitioner=partitioner, columns=columns, budget=BUDGET,
        unit=unit, seed=seed,
    )  # fmt: skip


def written(parts) -> list[pd.DataFrame]:
    return [
        pd.read_csv(part.folder / "records.csv", dtype=str, keep_default_na=False) for part in parts
    ]


partitioners = st.one_of(
    st.just(ByColumn("clinic")),
    st.builds(Iid, sites=st.integers(1, 5)),
    st.builds(DirichletLabels, sites=st.integers(1, 5), alpha=st.floats(1e-3, 100.0)),
    st.builds(QuantitySkew, sites=st.integers(1, 5), alpha=st.floats(1e-3, 100.0)),
)
letters = st.sampled_from("abcdef")
tables = st.lists(st.tuples(letters, letters, letters, letters), min_size=1, max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tables, partitioners, st.booleans(), st.integers(0, 2**32 - 1))
def test_every_row_is_in_one_part_and_every_unit_whole(
    tmp_path_factory, rows, partitioner, with_units, seed
):
    tmp_path = tmp_path_factory.mktemp("p")
    units = len({row[2] for row in rows}) if with_units else len(rows)
    columns = BY_PATIENT if with_units else COLUMNS
    if getattr(partitioner, "sites", 1) > units:
        with pytest.raises(TooFewRecords):
            divide(tmp_path, rows, partitioner, columns=columns, seed=seed)
        return
    parts = divide(tmp_path, rows, partitioner, columns=columns, seed=seed)
    frames = written(parts)
    assert Counter(row for f in frames for row in f.itertuples(index=False, name=None)) == Counter(
        rows
    )
    assert [part.records for part in parts] == [len(frame) for frame in frames]
    assert min(part.records for part in parts) >= 1
    assert sum(part.units for part in parts) == units
    if with_units:
        owners = [set(frame["patient"]) for frame in frames]
        assert sum(map(len, owners)) == len(set.union(*owners))


@pytest.mark.parametrize(
    "partitioner", [ByColumn("clinic"), Iid(4), DirichletLabels(4, 0.5), QuantitySkew(4, 0.5)]
)
def test_the_seed_decides_everything_that_is_random(tmp_path, partitioner):
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        divide(tmp_path, rows_of(400), partitioner, seed=seed, name=name)
        files = sorted((tmp_path / name).rglob("*.*"))
        contents.append([path.read_bytes() for path in files])
    assert contents[0] == contents[1]
    assert (contents[0] == contents[2]) == isinstance(partitioner, ByColumn)


def test_parts_are_sites_that_can_be_loaded(tmp_path):
    divide(tmp_path, rows_of(900), Iid(3), columns=BY_PATIENT)
    plan = Plan.from_mapping(
        {
            "plan": {"name": "p", "purpose": "test"},
            "model": {"base": "b", "task": "text_classification", "labels": ["l0", "l1"]},
            "data": {"dataset": "records"},
            "rounds": {"number": 1},
            "privacy": {"mode": "none", "unit": "patient", "rate": 0.5, "max_records_per_unit": 3},
        }
    )
    sites = load_sites(tmp_path / "sites")
    assert [site.name for site in sites] == ["site-1", "site-2", "site-3"]
    for site in sites:
        records = load_records(site, plan, roles={"text", "label"}, secret=b"k" * 32)
        assert (len(records), records.n_units()) == (300, 100)
        assert site.dataset("records").declared_units == 100


def test_by_column_makes_one_site_a_value_and_keeps_all_columns(tmp_path):
    rows = rows_of(280)
    parts = divide(tmp_path, rows, ByColumn("clinic"))
    assert [part.folder.name for part in parts] == [f"clinic-{i}" for i in range(4)]
    for part, frame in zip(parts, written(parts), strict=True):
        assert set(frame["clinic"].str.lower().str.replace(" ", "-")) == {part.folder.name}
        assert list(frame.columns) == ["note", "outcome", "patient", "clinic"]


def test_a_unit_of_two_clinics_goes_where_most_of_its_records_are(tmp_path):
    rows = [["a", "x", "p1", "A"], ["b", "x", "p1", "B"], ["c", "x", "p1", "B"],
            ["d", "x", "p2", "A"]]  # fmt: skip
    frames = written(divide(tmp_path, rows, ByColumn("clinic"), columns=BY_PATIENT))
    assert [sorted(frame["note"]) for frame in frames] == [["d"], ["a", "b", "c"]]


def test_values_that_make_one_site_name_make_two_sites(tmp_path):
    rows = [["a", "x", "p", "St. Mary"], ["b", "x", "p", "st mary"], ["c", "x", "p", "!"]]
    parts = divide(tmp_path, rows, ByColumn("clinic"))
    assert {part.folder.name for part in parts} == {"st-mary", "st-mary-2", "site"}
    assert {site.name for site in load_sites(tmp_path / "sites")} == {
        "st-mary",
        "st-mary-2",
        "site",
    }


def test_records_of_nobody_are_refused_and_no_unit_of_their_own(tmp_path):
    rows = [["a", "x", "p", "c"], ["b", "x", "", "c"], ["c", "x", "NULL", "c"]]
    with pytest.raises(RecordInvalid, match=r"'patient': empty unit in 2 rows \(3, 4\)"):
        divide(tmp_path, rows, Iid(1), columns=BY_PATIENT)


def test_a_packed_file_is_divided_as_the_file_itself(tmp_path):
    source = write_file(tmp_path / "all.csv", rows_of(20))
    (tmp_path / "all.csv.gz").write_bytes(gzip.compress(source.read_bytes()))
    found = [
        partition_file(path, tmp_path / name, partitioner=Iid(2), columns=COLUMNS, budget=BUDGET)
        for name, path in (("a", source), ("b", tmp_path / "all.csv.gz"))
    ]
    assert [f.to_dict() for f in written(found[0])] == [f.to_dict() for f in written(found[1])]


def test_iid_sites_are_equal_in_size_and_alike(tmp_path):
    parts = divide(tmp_path, rows_of(2002), Iid(4))
    assert sorted(part.records for part in parts) == [500, 500, 501, 501]
    for frame in written(parts):
        # Seeded, so no false alarms; 0.1 is 4.5 standard deviations.
        assert abs((frame["outcome"] == "l0").mean() - 0.5) < 0.1


def label_shares(parts) -> np.ndarray:
    counts = [frame["outcome"].value_counts(normalize=True) for frame in written(parts)]
    return pd.DataFrame(counts).fillna(0.0).to_numpy()


def test_dirichlet_sites_have_equal_size_and_skew_that_follows_alpha(tmp_path):
    rows = rows_of(3000, labels=5)
    top = {}
    for alpha in (1e-3, 0.5, 1e4):
        parts = divide(tmp_path, rows, DirichletLabels(10, alpha), name=f"a{alpha}")
        assert {part.records for part in parts} == {300}
        top[alpha] = label_shares(parts).max(axis=1).mean()
    assert top[1e-3] > 0.85  # one label a site, but for sites that came when it was used up
    assert 0.3 < top[0.5] < 0.9
    assert top[1e4] < 0.27  # 0.2 each, and 0.023 of it by chance


def test_dirichlet_shares_have_the_variance_of_the_dirichlet_distribution():
    # Of a Dir(alpha * prior) share the variance is p (1 - p) / (alpha + 1). With two labels and only
    # the first site looked at (nothing is used up yet), over 400 seeds.
    alpha, dealer, share = 2.0, DirichletLabels(3, 2.0), []
    labels = np.arange(60) % 2 == 0
    table = Table("t", range(60), {"outcome": np.where(labels, "l0", "l1").tolist()})
    units = Units(unit_of=np.arange(60), table=table, label="outcome")
    for seed in range(400):
        site_of, _ = dealer.deal(units, np.random.default_rng(seed))
        share.append(labels[site_of == 0].mean())
    multinomial = 0.25 * (1 - 1 / (alpha + 1)) / 20
    expected = 0.25 / (alpha + 1) + multinomial
    # Fixed seeds: no false alarms. The relative error of a variance over 400 draws is about 0.05.
    assert abs(np.var(share) / expected - 1) < 0.2
    assert abs(np.mean(share) - 0.5) < 0.06


def test_quantity_skew_follows_alpha_and_leaves_no_site_empty(tmp_path):
    spread = []
    for alpha in (0.01, 1.0, 1e6):
        parts = divide(tmp_path, rows_of(2000), QuantitySkew(8, alpha), name=f"a{alpha}")
        sizes = [part.records for part in parts]
        assert min(sizes) >= 1
        spread.append(np.std(sizes))
    assert spread[0] > spread[1] > spread[2]
    assert spread[2] < 5


def test_label_skew_without_a_label_column_is_told(tmp_path):
    with pytest.raises(ColumnMissing, match="role 'label'"):
        divide(tmp_path, rows_of(10), DirichletLabels(2, 1.0), columns={"text": "note"})


def test_columns_that_are_not_there_are_told(tmp_path):
    with pytest.raises(ColumnMissing, match="no column 'ward'"):
        divide(tmp_path, rows_of(10), ByColumn("ward"))
    with pytest.raises(ColumnMissing, match="no column 'remark'"):
        divide(tmp_path, rows_of(10), Iid(2), columns={"text": "remark"})


def test_sites_of_an_earlier_division_are_not_mixed_with_new_ones(tmp_path):
    divide(tmp_path, rows_of(50), Iid(3))
    divide(tmp_path, rows_of(50), Iid(3), seed=1)
    with pytest.raises(FolderOccupied, match="site-3"):
        divide(tmp_path, rows_of(50), Iid(2))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_formats_are_divided_too(tmp_path, kind):
    frame = pd.DataFrame(rows_of(90), columns=["note", "outcome", "patient", "clinic"])
    source = tmp_path / f"all.{kind}"
    if kind == "jsonl":
        frame.to_json(source, orient="records", lines=True)
    else:
        frame.to_parquet(source)
    parts = partition_file(
        source, tmp_path / "sites", partitioner=Iid(3), columns=COLUMNS, budget=BUDGET
    )
    together = pd.concat(written(parts)).sort_values("note", ignore_index=True)
    assert together.equals(frame.sort_values("note", ignore_index=True).astype(together.dtypes))


def test_a_file_of_unknown_kind_is_told(tmp_path):
    with pytest.raises(DatasetUnreadable, match=r"expected a name that ends in \.csv"):
        partition_file(
            tmp_path / "all.xls", tmp_path / "s", partitioner=Iid(2), columns=COLUMNS,
            budget=BUDGET,
        )  # fmt: skip
