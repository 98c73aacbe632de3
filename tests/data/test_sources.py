from __future__ import annotations

import csv
import json
import sqlite3
from contextlib import closing

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from silotune.data import sources
from silotune.data.site import DatasetConfig
from silotune.data.sources import read_dataset, read_file
from silotune.data.values import canonical
from silotune.errors import ColumnMissing, DatasetUnreadable, RecordInvalid, SiteConfigInvalid

SECRET = "Mrs Smith has gout"

# What CSV, JSON and SQLite can all hold: no half surrogates; NUL is not text to SQLite.
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
tables = st.lists(st.tuples(cells.map("x{}".format), cells, cells), min_size=1, max_size=8)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(tables)
def test_every_format_gives_back_what_was_written(tmp_path, rows):
    names = ["one", "two, or more", 'th"ree']
    for path in tmp_path.iterdir():
        path.unlink()
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    lines = (json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows)
    (tmp_path / "t.jsonl").write_bytes("\n".join(lines).encode())
    pd.DataFrame(rows, columns=names).to_parquet(tmp_path / "t.parquet")
    with sqlite3.connect(tmp_path / "t.db") as base:
        base.execute('CREATE TABLE t ("one", "two, or more", "th""ree")')
        base.executemany("INSERT INTO t VALUES (?, ?, ?)", rows)
    base.close()
    expected = {name: [canonical(row[i]) for row in rows] for i, name in enumerate(names)}
    for kind in ("csv", "jsonl", "parquet"):
        assert read_file(tmp_path / f"t.{kind}", kind=kind).columns == expected
    assert read_dataset(sql("t.db"), folder=tmp_path, columns=names).columns == expected


def sql(database: str, query: str = "SELECT * FROM t") -> DatasetConfig:
    return DatasetConfig.model_validate_json(
        json.dumps(
            {
                "format": "sql",
                "url": f"sqlite:///{database}",
                "query": query,
                "columns": {"text": "one"},
                "declared_units": 50,
            }
        )
    )


def test_numbers_in_a_text_file_stay_its_text_and_typed_ones_get_theirs(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n007,1.50\nNA,null\n")
    (tmp_path / "t.jsonl").write_text('{"a": 1.50, "b": 12345678901234567890}\n{"a": true}\n')
    assert read_file(tmp_path / "t.csv", kind="csv").columns == {
        "a": ["007", "NA"],
        "b": ["1.50", "null"],
    }
    assert read_file(tmp_path / "t.jsonl", kind="jsonl").columns == {
        "a": ["1.5", "true"],
        "b": ["12345678901234567890", ""],
    }


def test_parquet_numbers_and_missing_values_become_text(tmp_path):
    frame = pd.DataFrame({"a": [1, 2], "b": [True, None], "c": pd.Categorical(["x", "y"])})
    frame.to_parquet(tmp_path / "t.parquet")
    assert read_file(tmp_path / "t.parquet", kind="parquet").columns == {
        "a": ["1", "2"],
        "b": ["true", ""],
        "c": ["x", "y"],
    }


def test_only_the_wanted_columns_are_read(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": "x", "b": {"deep": [1]}}\n')
    assert read_file(tmp_path / "t.jsonl", kind="jsonl", columns=["a"]).columns == {"a": ["x"]}


def test_csv_rows_are_numbered_as_a_spreadsheet_shows_them(tmp_path):
    # A byte-order mark, a quoted line break (one spreadsheet row), blank rows as spreadsheets leave.
    content = '\ufeffa,b\r\n"x\ny",1\r\n\r\n,\r\nz,2\r\n,\r\n'
    (tmp_path / "t.csv").write_text(content, encoding="utf-8", newline="")
    table = read_file(tmp_path / "t.csv", kind="csv")
    assert table.columns == {"a": ["x\ny", "z"], "b": ["1", "2"]}
    assert list(table.rows) == [2, 5]


def test_other_delimiters_are_read_when_named(tmp_path):
    (tmp_path / "t.csv").write_text("a;b\nx;1,5\n")
    table = read_file(tmp_path / "t.csv", kind="csv", delimiter=";")
    assert table.columns == {"a": ["x"], "b": ["1,5"]}


def test_a_missing_column_is_named_and_the_first_row_is_not_quoted(tmp_path):
    # A file without a header: what looks like one is a record.
    (tmp_path / "t.csv").write_text(f"{SECRET},yes\nother,no\n")
    with pytest.raises(
        ColumnMissing, match=r"no column 'note' among its 2; is row 1 a header"
    ) as e:
        read_file(tmp_path / "t.csv", kind="csv", columns=["note"])
    assert SECRET not in str(e.value)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a,a\n1,2\n")
    with pytest.raises(ColumnMissing, match="more than once"):
        read_file(tmp_path / "t.csv", kind="csv")


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("t.csv", f"a,b\nx,1\n{SECRET}\n", RecordInvalid, "not 2 fields as in the header in row 3"),
        ("t.csv", f'a,b\n"{SECRET},1\n', DatasetUnreadable, "not valid CSV at line 2"),
        ("t.csv", "", DatasetUnreadable, "empty"),
        (
            "t.jsonl",
            f'{{"a": 1}}\n\n{{"a": "{SECRET}\n',
            RecordInvalid,
            "not a JSON object in row 3",
        ),
        ("t.jsonl", f'["{SECRET}"]\n', DatasetUnreadable, "is one JSON array"),
        (
            "t.jsonl",
            f'{{"a": ["{SECRET}"]}}\n',
            RecordInvalid,
            "column 'a': not plain text in row 1",
        ),
        ("t.jsonl", '{"a": "\\ud800"}\n', RecordInvalid, "column 'a': not plain text in row 1"),
        ("t.jsonl", "\n", DatasetUnreadable, "empty"),
        ("t.parquet", SECRET, DatasetUnreadable, "not a Parquet file"),
    ],
)
def test_a_broken_file_is_told_by_place_and_without_its_content(
    tmp_path, name, content, error, said
):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(error, match=said) as caught:
        read_file(path, kind=path.suffix[1:])
    assert str(path) in caught.value.detail
    assert SECRET not in caught.value.detail
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_bytes_that_are_not_utf8_are_told_by_line(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"a,b\nx,1\nM\xe9ni\xe8re,2\n")
    with pytest.raises(DatasetUnreadable, match="not UTF-8 text at line 3"):
        read_file(tmp_path / "t.csv", kind="csv")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_file_that_is_not_there_is_told(tmp_path, kind):
    with pytest.raises(DatasetUnreadable, match="No such file"):
        read_file(tmp_path / "none", kind=kind)
    with pytest.raises(DatasetUnreadable):
        read_file(tmp_path, kind=kind)


def test_a_long_list_of_rows_is_cut_and_counted(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n" + "x\n" * 40)
    with pytest.raises(RecordInvalid, match=r"in 40 rows \(2, 3, 4, 5, 6, \.\.\.\)"):
        read_file(tmp_path / "t.csv", kind="csv")


def test_a_parquet_column_of_lists_is_refused_by_name(tmp_path):
    pd.DataFrame({"a": [[SECRET]]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DatasetUnreadable, match="column 'a' of type list") as caught:
        read_file(tmp_path / "t.parquet", kind="parquet")
    assert SECRET not in caught.value.detail


@pytest.fixture
def clinic(tmp_path):
    with sqlite3.connect(tmp_path / "clinic.db") as base:
        base.execute("CREATE TABLE t (id INTEGER, one TEXT, share REAL, scan BLOB)")
        base.executemany(
            "INSERT INTO t VALUES (?, ?, ?, ?)",
            [(2, "50 % better: see p. 3", 0.5, b"\0"), (1, SECRET, None, b"")],
        )
    base.close()
    return tmp_path


def test_a_query_gives_its_result_as_text(clinic):
    query = "SELECT one, share, id AS number FROM t WHERE one NOT LIKE '%:x%' ORDER BY id"
    table = read_dataset(sql("clinic.db", query), folder=clinic, columns=["number", "one", "share"])
    assert table.columns == {
        "number": ["1", "2"],
        "one": [SECRET, "50 % better: see p. 3"],
        "share": ["", "0.5"],
    }
    assert list(table.rows) == [1, 2]


def test_a_database_agrees_with_pandas(clinic):
    with sqlite3.connect(clinic / "clinic.db") as base:
        frame = pd.read_sql("SELECT id, one FROM t", base)
    base.close()
    table = read_dataset(sql("clinic.db"), folder=clinic, columns=["id", "one"])
    assert table.columns["one"] == frame["one"].tolist()
    assert table.columns["id"] == frame["id"].astype(str).tolist()


def test_a_blob_is_no_text_and_its_rows_are_left_out(clinic):
    table = read_dataset(sql("clinic.db"), folder=clinic, columns=["scan"])
    assert table.columns == {"scan": []}
    assert [str(f) for f in table.faults.found] == [
        "column 'scan': not plain text in 2 rows (1, 2)"
    ]


def test_a_failing_query_is_told_without_query_or_url(clinic):
    with pytest.raises(DatasetUnreadable, match="the SQL query failed: OperationalError") as caught:
        read_dataset(sql("clinic.db", f"SELECT '{SECRET}' FROM x"), folder=clinic, columns=["a"])
    assert SECRET not in str(caught.value)
    with pytest.raises(ColumnMissing, match="no column 'two' among its 4"):
        read_dataset(sql("clinic.db"), folder=clinic, columns=["two"])


def test_a_missing_sqlite_file_is_told_and_not_created(tmp_path):
    with pytest.raises(DatasetUnreadable, match="no such database file"):
        read_dataset(sql("none.db"), folder=tmp_path, columns=["one"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["nonsense", "nosuchbase://u:hunter2@h/d", "mysql+nope://hunter2@h"]
)
def test_an_unusable_url_is_never_shown(monkeypatch, tmp_path, url):
    monkeypatch.setenv("CLINIC", url)
    config = sql("x").model_copy(update={"url": SecretStr("${CLINIC}")})
    with pytest.raises(DatasetUnreadable, match="the SQL query failed") as caught:
        read_dataset(config, folder=tmp_path, columns=["one"])
    assert url not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_an_unset_variable_stops_before_the_database(tmp_path, monkeypatch):
    monkeypatch.delenv("CLINIC", raising=False)
    config = sql("x").model_copy(update={"url": SecretStr("${CLINIC}")})
    with pytest.raises(SiteConfigInvalid, match="CLINIC is not set"):
        read_dataset(config, folder=tmp_path, columns=["one"])


def test_a_database_that_is_written_while_it_is_read_as_a_still_one_is_refused(clinic, monkeypatch):
    with closing(sqlite3.connect(clinic / "clinic.db")) as base:
        base.execute("PRAGMA journal_mode = WAL")
    assert len(read_dataset(sql("clinic.db"), folder=clinic, columns=["one"]).rows) == 2
    choose = sources.choose

    def write_meanwhile(*given):
        with closing(sqlite3.connect(clinic / "clinic.db")) as base:
            base.execute("DELETE FROM t")
            base.commit()
        return choose(*given)

    monkeypatch.setattr(sources, "choose", write_meanwhile)
    with pytest.raises(DatasetUnreadable, match="was changed while it was read"):
        read_dataset(sql("clinic.db"), folder=clinic, columns=["one"])


def test_a_database_that_may_not_be_opened_is_named(clinic, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(clinic / "clinic.db"))

    monkeypatch.setattr(sources.Path, "open", refuse)
    with pytest.raises(DatasetUnreadable, match=r"clinic\.db: Permission denied"):
        read_dataset(sql("clinic.db"), folder=clinic, columns=["one"])
