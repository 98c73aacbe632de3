"""Wrote examples/records/tables: invented letters, the same in every format of tables.

``python -m tests.data.example_tables`` writes them again.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import sqlite3
from datetime import datetime, timedelta
from pathlib import Path

import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = Path(__file__).parents[2] / "examples" / "records" / "tables"

FINDINGS = {
    1: ["asthma, inhaler twice a day", "gout of the left toe", "Menière's disease, stable"],
    0: ["a cold, better", "sprain of the right ankle", "cut of the thumb, 3 stitches"],
}  # fmt: skip
HEADER = ["title", "age", "letter", "course", "patient", "seen"]


def rows() -> list[list[object]]:
    found: list[list[object]] = []
    for number in range(24):
        course = number % 2
        letter = f'{FINDINGS[course][number // 2 % 3]}; "visit {number // 8 + 1}"'
        seen = datetime(2026, 3, 1, 8, 30) + timedelta(days=number)
        found.append(
            ["Letter", 30.5 + number % 8, letter, float(course), 1000.0 + number % 8, seen]
        )
    found[-1][4] = None  # nobody's
    found[-2][3] = 9.0  # a course that is none
    return found


def frame() -> pd.DataFrame:
    return pd.DataFrame(rows(), columns=HEADER)


def write_windows(path: Path) -> None:
    """As a spreadsheet of Windows exports in much of Europe."""
    with path.open("w", newline="", encoding="cp1252") as file:
        file.write("sep=;\r\n")
        writer = csv.writer(file, delimiter=";")
        writer.writerow(HEADER)
        for row in rows():
            title, age, letter, course, patient, seen = row
            number = "" if patient is None else f"{patient:.0f}"
            writer.writerow(
                [title, str(age).replace(".", ","), letter, f"{course:.0f}", number, seen]
            )


def write_parts(folder: Path) -> None:
    """As Spark writes a table that is partitioned by a column."""
    shutil.rmtree(folder, ignore_errors=True)
    table = frame()
    for year, part in table.groupby(table["course"].astype(int)):
        place = folder / f"course={year}"
        place.mkdir(parents=True)
        part.drop(columns="course").to_csv(
            place / "part-00000.csv.gz", index=False, compression={"method": "gzip", "mtime": 0}
        )
    (folder / "_SUCCESS").touch()


def save_to_disk(folder: Path) -> None:
    """As Hugging Face `datasets` saves a dataset."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    table = pa.Table.from_pandas(frame(), preserve_index=False).replace_schema_metadata()
    name = "data-00000-of-00001.arrow"
    with (
        pa.OSFile(str(folder / name), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name}], "_split": None})
    )


def write_all(folder: Path = FOLDER) -> None:
    folder.mkdir(exist_ok=True)
    table = frame()
    table.to_csv(folder / "letters.csv", index=False)
    (folder / "letters.csv.gz").write_bytes(
        gzip.compress((folder / "letters.csv").read_bytes(), mtime=0)
    )
    write_windows(folder / "windows.csv")
    records = [{**row, "seen": str(row["seen"])} for row in table.to_dict("records")]
    nested = [
        {"letter": {"title": r.pop("title"), "text": r.pop("letter")}, **r}
        for r in map(dict, records)
    ]
    (folder / "letters.jsonl").write_text("".join(json.dumps(r) + "\n" for r in nested))
    (folder / "letters.json").write_text(json.dumps(records, indent=1) + "\n")
    pq.write_table(
        pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(),
        folder / "letters.parquet",
    )
    write_parts(folder / "parts")
    save_to_disk(folder / "saved")
    book = openpyxl.Workbook()
    book.active.title = "Letters"
    book.active.append(["Clinic 7"])
    for row in [HEADER, *rows()]:
        book.active.append(row)
    book.save(folder / "letters.xlsx")
    (folder / "letters.db").unlink(missing_ok=True)
    with sqlite3.connect(folder / "letters.db") as base:
        base.execute(
            "CREATE TABLE letters (title, age REAL, letter, course REAL, patient REAL, seen)"
        )
        base.executemany(
            "INSERT INTO letters VALUES (?, ?, ?, ?, ?, ?)",
            [[*row[:5], str(row[5])] for row in rows()],
        )
    base.close()


if __name__ == "__main__":
    write_all()
