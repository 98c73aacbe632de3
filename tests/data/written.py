"""One table of typed values, written as every source has it."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq

Columns = Mapping[str, Sequence[Any]]

EAST = timezone(timedelta(hours=1))

KINDS: dict[str, tuple[list[Any], list[str]]] = {
    "whole": ([1001.0, None, 1003.0], ["1001", "", "1003"]),
    "large": ([12345678.0, 1e15, 1e16], ["12345678", "1000000000000000", "10000000000000000"]),
    "nan": ([float("nan"), 2.0, -0.0], ["", "2", "0"]),
    "part": ([0.5, 1e-7, 12345678.9], ["0.5", "1e-07", "12345678.9"]),
    "number": ([7, -1, None], ["7", "-1", ""]),
    "truth": ([True, False, None], ["true", "false", ""]),
    "day": ([date(2024, 2, 1), None, date(1930, 12, 31)], ["2024-02-01", "", "1930-12-31"]),
    "moment": (
        [datetime(2024, 2, 1, 8, 30), None, datetime(2024, 2, 1)],
        ["2024-02-01T08:30:00", "", "2024-02-01"],
    ),
    "zoned": (
        [datetime(2024, 2, 1, 8, 30, tzinfo=EAST), datetime(2024, 1, 1, tzinfo=UTC), None],
        ["2024-02-01T07:30:00Z", "2024-01-01T00:00:00Z", ""],
    ),
    "code": (["007", "1.50", "1E5"], ["007", "1.50", "1E5"]),
    "text": (
        ['She said "no", and\nleft.', "", "Ménière"],
        ['She said "no", and\nleft.', "", "Ménière"],
    ),
}
"""By kind: values as a program holds them, and the one text of each."""

VALUES: dict[str, list[Any]] = {name: values for name, (values, _) in KINDS.items()}
TEXTS = {name: texts for name, (_, texts) in KINDS.items()}


def _rows(columns: Columns) -> list[dict[str, Any]]:
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _plain(value: Any) -> Any:
    """What JSON, SQLite and Excel can hold: moments as text."""
    return str(value) if isinstance(value, date) else value


def write_csv(path: Path, columns: Columns) -> None:
    """As pandas does, whose floats and truths are Python's own."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in _rows(columns):
            writer.writerow(["" if v is None or v != v else str(v) for v in row.values()])


def write_jsonl(path: Path, columns: Columns) -> None:
    lines = (json.dumps({k: _plain(v) for k, v in row.items()}) for row in _rows(columns))
    path.write_text("\n".join(lines) + "\n")


def write_json(path: Path, columns: Columns) -> None:
    path.write_text(json.dumps([{k: _plain(v) for k, v in row.items()} for row in _rows(columns)]))


def _arrow(columns: Columns) -> pa.Table:
    return pa.table({name: pa.array(values, from_pandas=False) for name, values in columns.items()})


def write_parquet(path: Path, columns: Columns) -> None:
    pq.write_table(_arrow(columns), path)


def write_arrow(path: Path, columns: Columns) -> None:
    table = _arrow(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_excel(path: Path, columns: Columns) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(list(columns))
    for row in _rows(columns):
        sheet.append([_cell(value) for value in row.values()])
    book.save(path)


def _cell(value: Any) -> Any:
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.isoformat()  # Excel knows no offsets
    return None if value != value else value


def write_sql(path: Path, columns: Columns) -> None:
    names = ", ".join(f'"{name}"' for name in columns)
    with sqlite3.connect(path) as base:
        base.execute(f"CREATE TABLE t ({names})")
        marks = ", ".join("?" * len(columns))
        rows = [[_in_sqlite(v) for v in row.values()] for row in _rows(columns)]
        base.executemany(f"INSERT INTO t VALUES ({marks})", rows)
    base.close()


def _in_sqlite(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).upper()  # SQLite has no truth of its own
    return _plain(value)


WRITERS: dict[str, Callable[[Path, Columns], None]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "json": write_json,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "excel": write_excel,
    "sql": write_sql,
}
"""One for each format that can hold any table; those with columns of their own have their own tests."""

FIXED = {"fhir", "i2b2", "camt053", "ofx", "dicom_sr"}
"""Formats whose columns and values a standard fixes as text."""


def source_of(kind: str, folder: Path, columns: Columns) -> dict[str, str]:
    """Write a source of a format; what its entry in site.toml says of it."""
    path = folder / f"t.{kind}"
    WRITERS[kind](path, columns)
    if kind == "sql":
        return {"format": "sql", "url": f"sqlite:///{path.name}", "query": "SELECT * FROM t"}
    return {"format": kind, "path": path.name}
