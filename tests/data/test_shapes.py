"""The shapes that files come in, each by site.toml and to the records of a plan."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
import zipfile

import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from silotune.data import parts
from silotune.data.declared import new_secret
from silotune.data.parts import parts_of
from silotune.data.records import load_records
from silotune.data.site import SiteConfig
from silotune.data.sources import read_file
from silotune.errors import ColumnMissing, DatasetUnreadable, RecordInvalid, SiteConfigInvalid
from silotune.plan.plan import Plan

HEADER = ["note", "outcome", "patient"]
ROWS = [["Ménière's", "no", "p1"], ['said "yes"', "yes", "p2"], ["two\nlines", "no", "p3"]]
TEXTS = [row[0] for row in ROWS]

PLAN = Plan.from_mapping(
    {
        "plan": {"name": "p", "purpose": "test"},
        "model": {"base": "b", "task": "text_classification", "labels": ["no", "yes"]},
        "data": {"dataset": "notes"},
        "rounds": {"number": 2},
        "privacy": {"mode": "none", "unit": "patient", "rate": 0.5},
    }
)


def site_of(folder, **said) -> SiteConfig:
    columns = {"text": "note", "label": "outcome", "unit": "patient", **said.pop("columns", {})}
    dataset = {"unit": "patient", "declared_units": 50, "columns": columns, "path": "t", **said}
    return SiteConfig.from_mapping({"name": "s", "datasets": {"notes": dataset}}, folder=folder)


def records_of(folder, **said):
    site = site_of(folder, **said)
    return load_records(site, PLAN, roles={"text", "label"}, secret=new_secret())


def texts_of(folder, **said) -> list[str]:
    records = records_of(folder, **said)
    assert records.left_out == ()
    return [example["text"] for example in records.examples]


def delimited(delimiter: str = ",", rows=ROWS) -> str:
    lines = []

    class Lines:
        write = lines.append

    csv.writer(Lines(), delimiter=delimiter).writerows([HEADER, *rows])
    return "".join(lines)


def test_a_file_of_windows_is_read_when_its_encoding_is_named(tmp_path):
    (tmp_path / "t").write_bytes(delimited().encode("cp1252"))
    assert texts_of(tmp_path, format="csv", encoding="cp1252") == TEXTS
    assert records_of(tmp_path, format="csv").rows_left_out == 1  # unnamed: its row is no UTF-8
    with pytest.raises(DatasetUnreadable, match="not UTF-8 text at line 2") as caught:
        read_file(tmp_path / "t", kind="csv")
    assert 'encoding = "cp1252"' in caught.value.remedy


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_utf16_is_read_when_named_and_told_by_its_mark_when_not(tmp_path, encoding, kind):
    records = [dict(zip(HEADER, row, strict=True)) for row in ROWS]
    text = {
        "csv": delimited(),
        "jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in records),
        "json": json.dumps(records, ensure_ascii=False),
    }[kind]
    (tmp_path / "t").write_bytes(text.encode(encoding))
    assert texts_of(tmp_path, format=kind, encoding=encoding) == TEXTS
    if encoding == "utf-16":
        with pytest.raises(DatasetUnreadable, match="is UTF-16 text") as caught:
            records_of(tmp_path, format=kind)
        assert 'encoding = "utf-16"' in caught.value.remedy


def test_half_a_character_of_utf16_costs_its_row_alone(tmp_path):
    text = "note,outcome,patient\nx,no,p1\n?,no,p2\ny,no,p3\n".encode("utf-16-le")
    (tmp_path / "t").write_bytes(text.replace("?".encode("utf-16-le"), b"\x00\xd8"))
    records = records_of(tmp_path, format="csv", encoding="utf-16-le")
    assert [e["text"] for e in records.examples] == ["x", "y"]
    assert [str(part) for part in records.left_out] == ["column 'note': not plain text in row 3"]


def test_an_encoding_that_is_none_is_refused_by_the_site(tmp_path):
    for name in ("latin-9000", "base64", "rot13"):
        with pytest.raises(SiteConfigInvalid, match="no encoding"):
            site_of(tmp_path, format="csv", encoding=name)
    assert site_of(tmp_path, format="csv", encoding="UTF8").datasets["notes"].encoding == "utf-8"


def test_lines_before_the_header_are_skipped_and_rows_keep_their_numbers(tmp_path):
    (tmp_path / "t").write_text(
        "Export of clinic 7\n\n" + delimited(rows=[*ROWS, ["", "no", "p9"]])
    )
    records = records_of(tmp_path, format="csv", skip_rows=2)
    assert len(records) == 3
    # Two lines, the header, three records, of which one has a line break in it: a row all the same.
    assert [str(part) for part in records.left_out] == ["column 'note': empty text in row 7"]


def test_a_first_line_that_names_the_delimiter_is_believed(tmp_path):
    (tmp_path / "t").write_text("sep=;\n" + delimited(";", [*ROWS, ["", "no", "p9"]]))
    records = records_of(tmp_path, format="csv")
    assert [e["text"] for e in records.examples] == TEXTS
    assert [str(part) for part in records.left_out] == ["column 'note': empty text in row 6"]


def test_decimal_commas_are_the_numbers_that_they_are(tmp_path):
    rows = [["1,5", "no", "1.234,0"], ["2,50", "no", "p,1"], ["-3,0", "no", "7"]]
    (tmp_path / "t").write_text(delimited(";", rows))
    table = read_file(tmp_path / "t", kind="csv", delimiter=";")
    assert table.columns["patient"] == ["1.234,0", "p,1", "7"]  # it has to be said
    records = records_of(
        tmp_path, format="csv", delimiter=";", decimal=",", columns={"text": "patient"}
    )
    assert [e["text"] for e in records.examples] == ["1234", "p,1", "7"]
    assert texts_of(tmp_path, format="csv", delimiter=";", decimal=",") == ["1.5", "2.50", "-3"]


def packed_by(name: str, content: bytes) -> bytes:
    if name == "gzip":
        return gzip.compress(content)
    return pa.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("packer", ["gzip", "zstd"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_packed_files_are_unpacked_whatever_they_are_called(tmp_path, packer, kind):
    records = [dict(zip(HEADER, row, strict=True)) for row in ROWS]
    lines = "\n".join(json.dumps(r) for r in records)
    text = {"csv": delimited(), "jsonl": lines, "json": json.dumps(records)}[kind]
    (tmp_path / "t").write_bytes(packed_by(packer, text.encode()))
    assert texts_of(tmp_path, format=kind) == TEXTS


@pytest.mark.parametrize("packer", ["gzip", "zstd"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path, packer, kind, monkeypatch):
    monkeypatch.setattr(parts, "ALWAYS_UNPACKED", 2**20)
    content = b'{"note": "' + b"a" * (8 * 2**20)
    (tmp_path / "t").write_bytes(packed_by(packer, content))
    with pytest.raises(
        DatasetUnreadable, match=r"unpacks to more than .* bytes, 200 times its size"
    ):
        records_of(tmp_path, format=kind)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_repeat_beyond_all_bounds_are_refused(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(parts, "ALWAYS_UNPACKED", 2**20)
    table = pa.table({name: pa.array(["a" * 10_000]).take([0] * 2_000) for name in HEADER})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "t")
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            pa.OSFile(str(tmp_path / "t"), "wb") as sink,
            pa.ipc.new_file(sink, table.schema, options=options) as writer,
        ):
            writer.write_table(table)
    assert (tmp_path / "t").stat().st_size < 2**18
    with pytest.raises(DatasetUnreadable, match="unpacks to more than"):
        records_of(tmp_path, format=kind)


@pytest.mark.parametrize("packer", ["gzip", "zstd"])
def test_a_packed_file_that_is_cut_off_is_told(tmp_path, packer):
    packed = packed_by(packer, os.urandom(2**16).hex().encode())
    (tmp_path / "t").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DatasetUnreadable, match="/t: it is damaged"):
        records_of(tmp_path, format="csv")


@pytest.mark.parametrize(
    ("start", "said"),
    [(b"BZh91AY&SY", "bzip2"), (b"\xfd7zXZ\x00", "xz"), (b"PK\x03\x04", "Excel"),
     (b"PAR1\x15\x04", "Parquet"), (b"ARROW1\0\0", "Arrow")],
)  # fmt: skip
def test_a_file_that_is_no_text_is_told_by_what_it_is(tmp_path, start, said):
    (tmp_path / "t").write_bytes(start + bytes(range(256)))
    with pytest.raises(DatasetUnreadable, match=f"is .*{said}.*, not UTF-8 text"):
        records_of(tmp_path, format="csv")


def write_parts(folder, kind: str) -> None:
    """As Spark does: parts, a mark that it is done, checksums, a folder for each year."""
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    for year, rows in (("2024", ROWS[:2]), ("2025", ROWS[2:])):
        (folder / f"year={year}").mkdir()
        part = folder / f"year={year}" / "part-00000"
        (folder / f"year={year}" / ".part-00000.crc").write_bytes(b"\0\1")
        frame = pd.DataFrame(rows, columns=HEADER)
        if kind == "parquet":
            frame.to_parquet(part)
        elif kind == "csv":
            frame.to_csv(part, index=False)
        else:
            frame.to_json(part, orient="records", lines=True)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_folder_of_parts_is_one_dataset(tmp_path, kind):
    write_parts(tmp_path / "t", kind)
    assert texts_of(tmp_path, format=kind) == TEXTS
    assert texts_of(tmp_path, format=kind, columns={"text": "year"}) == ["2024", "2024", "2025"]
    found = [str(path.relative_to(tmp_path)) for path in parts_of(tmp_path / "t")]
    assert found == ["t/year=2024/part-00000", "t/year=2025/part-00000"]


def test_a_row_of_a_folder_is_named_with_its_file(tmp_path):
    (tmp_path / "t").mkdir()
    for name, rows in (
        ("a.csv", ROWS),
        ("b.csv", [["x", "no", ""], ["only one"], ["y", "no", ""]]),
    ):
        (tmp_path / "t" / name).write_text(delimited(rows=rows))
    (tmp_path / "t" / "c.csv").touch()
    records = records_of(tmp_path, format="csv")
    assert [e["text"] for e in records.examples] == TEXTS
    assert [str(part) for part in records.left_out] == [
        "not 3 fields as in the header in row 3 of b.csv",
        "column 'patient': empty unit in 2 rows (2 of b.csv, 4 of b.csv)",
    ]
    with pytest.raises(RecordInvalid, match=r"in row 3 of b\.csv"):
        read_file(tmp_path / "t", kind="csv", columns=HEADER)
    (tmp_path / "t" / "d.csv").write_text("other\n1\n")
    with pytest.raises(ColumnMissing, match=r"d\.csv has no column 'note'"):
        records_of(tmp_path, format="csv")


def test_a_folder_without_a_file_is_told(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "_SUCCESS").touch()
    with pytest.raises(DatasetUnreadable, match="is a folder without a file of records"):
        records_of(tmp_path, format="csv")


NESTED = [
    {"content": [{"attachment": {"data": "first"}}, {"attachment": {"data": "second"}}],
     "subject": {"id": 7.0}, "a.b": "dotted"},
    {"content": [], "subject": {"id": 8}, "a.b": None},
    {"content": [{"attachment": {"data": "third"}}], "subject": {"id": 7}, "a.b": "x"},
]  # fmt: skip


def write_nested(path, kind: str) -> None:
    if kind == "json":
        path.write_text(json.dumps(NESTED))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, NESTED)))
    else:
        table = pa.Table.from_pylist(NESTED)
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with (
                pa.OSFile(str(path), "wb") as sink,
                pa.ipc.new_stream(sink, table.schema) as writer,
            ):
                writer.write_table(table)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_nested_fields_are_columns_by_their_path_and_dotted_names_by_their_name(tmp_path, kind):
    write_nested(tmp_path / "t", kind)
    names = ["content.attachment.data", "subject.id", "a.b"]
    found = read_file(tmp_path / "t", kind=kind, columns=names).columns
    assert found == {
        "content.attachment.data": ["first", "", "third"],
        "subject.id": ["7", "8", "7"],
        "a.b": ["dotted", "", "x"],
    }
    with pytest.raises(ColumnMissing, match="no column 'other' among its 3"):
        read_file(tmp_path / "t", kind=kind, columns=["other.name"])
    with pytest.raises(ColumnMissing, match="is no path"):
        read_file(tmp_path / "t", kind=kind, columns=["content..data"])


def test_a_json_array_is_read_by_name_and_told_where_lines_were_said(tmp_path):
    records = [dict(zip(HEADER, row, strict=True)) for row in ROWS]
    (tmp_path / "t").write_text(json.dumps(records, indent=2))
    assert texts_of(tmp_path, format="json") == TEXTS
    with pytest.raises(DatasetUnreadable, match="is one JSON array") as caught:
        records_of(tmp_path, format="jsonl")
    assert 'format = "json"' in caught.value.remedy
    (tmp_path / "t").write_text(json.dumps(records[0]))
    with pytest.raises(DatasetUnreadable, match="is no JSON array"):
        records_of(tmp_path, format="json")


def test_a_json_array_that_breaks_off_gives_what_is_in_front(tmp_path):
    good = json.dumps(dict(zip(HEADER, ROWS[0], strict=True)))
    for rest in (', {"note": "x', ', "x"] trailing', " {}", ", nul"):
        (tmp_path / "t").write_text(f"[{good}, 7{rest}")
        records = records_of(tmp_path, format="json")
        assert [e["text"] for e in records.examples] == [TEXTS[0]]
        assert "not a JSON object in" in str(records.left_out[-1])
    (tmp_path / "t").write_text("[]")
    assert texts_of(tmp_path, format="json") == []


def write_book(path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["nothing"])
    sheet = book.create_sheet("Letters")
    for row in (["Clinic 7"], [], HEADER, *ROWS, [], ["", "no", "p9"], [None, None, None]):
        sheet.append(row)
    book.save(path)


def test_a_sheet_of_a_workbook_is_read_by_name(tmp_path):
    write_book(tmp_path / "t")
    said = {"format": "excel", "sheet": "Letters", "skip_rows": 1}
    records = records_of(tmp_path, **said)
    assert [e["text"] for e in records.examples] == TEXTS
    assert [str(part) for part in records.left_out] == ["column 'note': empty text in row 8"]
    with pytest.raises(ColumnMissing, match=r"no column 'note'.*is row 1 of the sheet the header"):
        records_of(tmp_path, format="excel")
    with pytest.raises(DatasetUnreadable, match="no sheet 'Notes' among its 2"):
        records_of(tmp_path, format="excel", sheet="Notes")


def test_a_workbook_that_is_none_or_a_bomb_is_refused(tmp_path):
    (tmp_path / "t").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DatasetUnreadable, match="not an Excel workbook"):
        records_of(tmp_path, format="excel")
    with zipfile.ZipFile(tmp_path / "t", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("xl/worksheets/sheet1.xml", b" " * (parts.ALWAYS_UNPACKED + 1))
    with pytest.raises(DatasetUnreadable, match=r"unpacks to more than .* bytes, 200 times"):
        records_of(tmp_path, format="excel")


def test_a_site_without_openpyxl_is_told_what_to_install(tmp_path, monkeypatch):
    write_book(tmp_path / "t")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DatasetUnreadable, match="needs openpyxl") as caught:
        records_of(tmp_path, format="excel", sheet="Letters")
    assert "silotune[excel]" in caught.value.remedy


def test_entities_of_a_workbook_are_not_blown_up(tmp_path):
    write_book(tmp_path / "t")
    bomb = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(12)
    )
    with zipfile.ZipFile(tmp_path / "t") as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    members["xl/worksheets/sheet1.xml"] = f"{bomb}]><x>&m;</x>".encode()
    with zipfile.ZipFile(tmp_path / "t", "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    with pytest.raises(DatasetUnreadable, match="not an Excel workbook"):
        read_file(tmp_path / "t", kind="excel")


def save_to_disk(folder, rows) -> None:
    """What `datasets.Dataset.save_to_disk` writes, of two files."""
    folder.mkdir(parents=True)
    names = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    for name, part in zip(names, (rows[:1], rows[1:]), strict=True):
        table = pa.table({h: [row[n] for row in part] for n, h in enumerate(HEADER)})
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0",
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-1.arrow").write_bytes(b"another thing")


def test_a_folder_of_hugging_face_datasets_is_read_as_it_says(tmp_path):
    save_to_disk(tmp_path / "t" / "train", ROWS)
    assert texts_of(tmp_path, format="arrow", path="t/train") == TEXTS
    (tmp_path / "t" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DatasetUnreadable, match="has several splits"):
        records_of(tmp_path, format="arrow")
    state = tmp_path / "t" / "train" / "state.json"
    for name in ("../../secret.arrow", "/etc/passwd"):
        state.write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(DatasetUnreadable, match="rows stand in other files"):
            records_of(tmp_path, format="arrow", path="t/train")


def test_one_arrow_file_is_read_whether_stream_or_file(tmp_path):
    table = pa.table({h: [row[n] for row in ROWS] for n, h in enumerate(HEADER)})
    for make in (pa.ipc.new_stream, pa.ipc.new_file):
        with pa.OSFile(str(tmp_path / "t"), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table)
        assert texts_of(tmp_path, format="arrow") == TEXTS
    (tmp_path / "t").write_bytes(b"ARROW1 no more")
    with pytest.raises(DatasetUnreadable, match="not an Arrow file"):
        records_of(tmp_path, format="arrow")


def test_a_setting_of_another_format_is_refused(tmp_path):
    for key, value in (
        ("delimiter", ";"),
        ("decimal", ","),
        ("encoding", "cp1252"),
        ("sheet", "x"),
    ):
        with pytest.raises(SiteConfigInvalid, match=f"{key} is for format .* only"):
            site_of(tmp_path, format="parquet", **{key: value})


def test_parquet_keeps_small_floats_as_they_were_written(tmp_path):
    table = pa.table(
        {
            "note": pa.array([0.1, 2.0, None], pa.float32()),
            "outcome": ["no", "no", "no"],
            "patient": pa.array(["a", "b", "a"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "t")
    records = records_of(tmp_path, format="parquet")
    assert [e["text"] for e in records.examples] == ["0.1", "2"]
