"""What is wrong with a record is told by file, row and column: what stands in it is told nowhere."""

from __future__ import annotations

import json
import logging
import sqlite3
import traceback
from pathlib import Path

import openpyxl
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from silotune.cli import app
from silotune.data.declared import new_secret
from silotune.data.records import load_records
from silotune.data.roles import read_roles
from silotune.data.site import SiteConfig
from silotune.errors import SilotuneError
from tests.data.test_roles import plan_of
from tests.data.written import WRITERS, source_of

CANARY = "MrsSmithHasGout"
GOOD = {"note": ["fine", "well"], "outcome": ["no", "yes"], "patient": ["p1", "p2"]}


def broken_csv(path: Path) -> None:
    lines = ["note,outcome,patient", "fine,no,p1", f"{CANARY}", f"{CANARY},no,,", f",no,{CANARY}"]
    path.write_bytes("\n".join([*lines, f"{CANARY}\udcff,no,p", f'"{CANARY}"x,no,p']).encode(
        "utf-8", "surrogateescape"))  # fmt: skip


def broken_jsonl(path: Path) -> None:
    good = json.dumps({"note": "fine", "outcome": "no", "patient": "p1"})
    bad = [f'{{"note": "{CANARY}', f'["{CANARY}"]', json.dumps({"note": [CANARY], CANARY: 1}),
           json.dumps({"note": f"{CANARY}\ud800"}), json.dumps({"patient": CANARY})]  # fmt: skip
    path.write_text("\n".join([good, *bad]))


def broken_json(path: Path) -> None:
    good = json.dumps({"note": "fine", "outcome": "no", "patient": "p1"})
    path.write_text(f'[{good}, "{CANARY}", {{"note": ["{CANARY}"]}}, {{"note": "{CANARY}')


def bad_columns() -> dict[str, pa.Array]:
    note = pa.array([b"fine", f"{CANARY}".encode() + b"\xff", CANARY.encode()])
    return {"note": note, "outcome": pa.array(["no", "no", CANARY]), "patient": ["p1", "p2", ""]}


def broken_excel(path: Path) -> None:
    book = openpyxl.Workbook()
    for row in (["note", "outcome", "patient"], ["fine", "no", "p1"], ["", CANARY, "p2"], [CANARY]):
        book.active.append(row)
    book.save(path)


def broken_sql(path: Path) -> None:
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE t (note, outcome, patient)")
        rows = [("fine", "no", "p1"), (CANARY.encode(), "no", "p2"), (CANARY, "no", None)]
        base.executemany("INSERT INTO t VALUES (?, ?, ?)", rows)
        base.execute(
            "INSERT INTO t VALUES (CAST(? AS TEXT), 'no', 'p3')", (CANARY.encode() + b"\xff",)
        )
    base.close()


BROKEN = {
    "csv": broken_csv,
    "jsonl": broken_jsonl,
    "json": broken_json,
    "parquet": lambda path: WRITERS["parquet"](path, bad_columns()),
    "arrow": lambda path: WRITERS["arrow"](path, bad_columns()),
    "excel": broken_excel,
    "sql": broken_sql,
}
"""Sources with one good record and bad ones that hold the canary."""


def no_file_at_all(path: Path) -> None:
    path.write_text(f"{CANARY} {CANARY}\n")


def test_every_source_has_its_bad_records_here():
    assert set(BROKEN) == set(WRITERS)


def site_of(folder: Path, kind: str, write) -> SiteConfig:
    entry = source_of(kind, folder, GOOD)
    path = folder / f"t.{kind}"
    path.unlink()
    write(path)
    columns = {"text": "note", "label": "outcome", "unit": "patient"}
    dataset = {**entry, "unit": "patient", "declared_units": 50, "columns": columns}
    (folder / "site.toml").write_text(
        'name = "s"\n[datasets.notes]\n'
        + "".join(f"{k} = {json.dumps(v)}\n" for k, v in dataset.items() if k != "columns")
        + "[datasets.notes.columns]\n"
        + "".join(f"{k} = {json.dumps(v)}\n" for k, v in columns.items())
    )
    (folder / "site.toml").chmod(0o600)
    return SiteConfig.load(folder / "site.toml")


def said_of(exc: BaseException) -> str:
    """All that a traceback with its causes and contexts would show, but for the lines of code."""
    return "".join(traceback.format_exception(exc)) + repr(exc) + str(getattr(exc, "remedy", ""))


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_records_are_told_by_row_and_never_by_what_they_hold(tmp_path, kind, caplog):
    site = site_of(tmp_path, kind, BROKEN[kind])
    with caplog.at_level(logging.DEBUG):
        records = load_records(site, plan_of(), roles={"text", "label"}, secret=new_secret())
    assert [e["text"] for e in records.examples] == ["fine"]
    assert records.rows_left_out >= 2
    told = "\n".join(map(str, records.left_out))
    assert " row" in told
    assert CANARY not in told
    assert CANARY not in caplog.text


@pytest.mark.parametrize("kind", BROKEN)
def test_a_refusal_and_its_traceback_hold_nothing_of_a_record(tmp_path, kind):
    site = site_of(tmp_path, kind, BROKEN[kind])
    dataset = site.datasets["notes"]
    roles = {"text": "note", "unit": "patient"}
    try:
        read_roles(dataset, folder=tmp_path, roles=roles, strict=True)
    except SilotuneError as exc:
        assert CANARY not in said_of(exc)
        assert f"t.{kind}" in str(exc)
    else:
        assert kind in ("excel", "sql")  # these know no row that can't be read
    with pytest.raises(SilotuneError) as caught:
        read_roles(dataset, folder=tmp_path, roles={"text": "remark"}, strict=True)
    assert CANARY not in said_of(caught.value)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_not_of_its_format_is_told_without_what_it_holds(tmp_path, kind):
    site = site_of(tmp_path, kind, no_file_at_all)
    with pytest.raises(SilotuneError) as caught:
        read_roles(site.datasets["notes"], folder=tmp_path, roles={"text": "note"}, strict=True)
    assert CANARY not in said_of(caught.value)


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("before", [[], ["--debug"]], ids=["plain", "debug"])
@pytest.mark.parametrize("after", [[], ["--json"]], ids=["table", "json"])
def test_the_doctor_tells_where_and_nothing_that_stands_there(tmp_path, kind, before, after):
    site_of(tmp_path, kind, BROKEN[kind])
    argv = [*before, "site", "doctor", "--config", str(tmp_path / "site.toml"), *after]
    shown = CliRunner().invoke(app, argv)
    if after:
        (found,) = [f for f in json.loads(shown.output)["findings"] if "notes" in f["check"]]
        assert any(word in json.dumps(found) for word in (" row", " line", "column"))
    assert CANARY not in shown.output
