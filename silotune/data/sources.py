"""Reading tables of strings: CSV, JSON lines, Parquet, or a SQL query.

Values stay the text that the source has: no column becomes a number, so that a label ``"1"`` is the
same label in every format. A missing value is the empty string. Messages name files, rows and
columns, and never show what a row holds: not even the header, which in a file that lacks one is a
record.

Rows are numbered as the reader of the source counts them: in a CSV file as a spreadsheet does (the
header is row 1, blank rows count), in JSON lines by line, elsewhere from 1.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from silotune.data.faults import Faults
from silotune.data.site import DatasetConfig, Format, expand_url
from silotune.errors import ColumnMissing, DatasetUnreadable

# The default of 128 KiB is shorter than a long clinical note.
_LONGEST_FIELD = 2**31 - 1

_UNPACK = "Unpack it, and name the unpacked file in site.toml."

# What is no text, by its first bytes: its name, and what to do.
_NO_TEXT = {
    b"\x1f\x8b": ("packed by gzip", _UNPACK),
    b"BZh": ("packed by bzip2", _UNPACK),
    b"\xfd7zXZ": ("packed by xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", _UNPACK),
    b"PK\x03\x04": ("a zip archive or an Excel file", "Unpack it, or export the sheet as CSV."),
    b"PAR1": ("a Parquet file", 'Say format = "parquet" for this dataset in site.toml.'),
    b"\xff\xfe": ("UTF-16 text", "Save it as UTF-8: iconv -f UTF-16 -t UTF-8."),
}


@dataclass(frozen=True)
class Table:
    """Columns of strings, all of one length.

    Attributes
    ----------
    source : str
        The file or query, as messages name it.
    rows : sequence of int
        The number of each record in the source, for messages.
    columns : mapping of str to sequence of str
        The values by column.
    """

    source: str
    rows: Sequence[int]
    columns: Mapping[str, Sequence[str]]


def read_dataset(dataset: DatasetConfig, *, folder: Path, columns: Collection[str]) -> Table:
    """Some columns of a dataset; relative paths start from `folder`.

    Raises
    ------
    DatasetUnreadable, ColumnMissing, RecordInvalid
        As `read_file`.
    SiteConfigInvalid
        The URL needs an environment variable that is not set.
    """
    if dataset.format == "sql":
        assert dataset.url is not None
        assert dataset.query is not None  # validated
        return _read_query(expand_url(dataset.url), dataset.query, folder, columns)
    assert dataset.path is not None  # validated
    path = folder / dataset.path
    return read_file(path, kind=dataset.format, columns=columns, delimiter=dataset.delimiter)


def read_file(
    path: Path, *, kind: Format, columns: Collection[str] | None = None, delimiter: str = ","
) -> Table:
    """Some columns of a file, or all of them when `columns` is None.

    Raises
    ------
    DatasetUnreadable
        The file is missing, not readable, not of its format, or not UTF-8.
    ColumnMissing
        A wanted column is not there, or is there twice.
    RecordInvalid
        A row has another number of fields than the header, or a value is not plain text.
    """
    if path.is_dir():
        raise DatasetUnreadable(
            f"{path} is a folder, and path has to name one file",
            remedy="Join the parts into one file (in Python: pyarrow.parquet.write_table("
            "pyarrow.parquet.read_table(FOLDER), FILE)), or offer them as datasets of their own.",
        )
    try:
        if kind == "csv":
            return _read_csv(path, delimiter, columns)
        if kind == "jsonl":
            return _read_jsonl(path, columns)
        return _read_parquet(path, columns)
    except OSError as exc:
        raise DatasetUnreadable(f"{path}: {exc.strerror or type(exc).__name__}") from None


def _read_csv(path: Path, delimiter: str, wanted: Collection[str] | None) -> Table:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        # A spreadsheet writes its trailing blank rows too; they hold no record.
        numbered = [(number, row) for number, row in enumerate(reader, start=1) if any(row)]
    except csv.Error:
        raise DatasetUnreadable(f"{path}: not valid CSV at line {reader.line_num}") from None
    if not numbered:
        raise DatasetUnreadable(f"{path}: the file is empty")
    header = [name.strip() for name in numbered.pop(0)[1]]
    hint = f"; is row 1 a header, and is the delimiter {delimiter!r}?"
    names = _choose(header, wanted, str(path), hint)
    faults = Faults(str(path))
    odd = [number for number, row in numbered if len(row) != len(header)]
    faults.add(f"not {len(header)} fields as in the header", odd)
    faults.check()
    places = [header.index(name) for name in names]
    values = {
        name: [row[place] for _, row in numbered] for name, place in zip(names, places, strict=True)
    }
    return Table(str(path), [number for number, _ in numbered], values)


def _read_jsonl(path: Path, wanted: Collection[str] | None) -> Table:
    faults = Faults(str(path))
    numbers, records, broken = [], [], []
    # Not splitlines(): JSON text may hold U+2028, which is no line end here.
    text = _read_text(path)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            numbers.append(number)
            records.append(record)
        else:
            broken.append(number)
    if broken and text.lstrip().startswith("["):
        raise DatasetUnreadable(
            f"{path} is one JSON array, and the format jsonl is one JSON object a line",
            remedy=f"Write each object on a line of its own: jq -c '.[]' {path.name} > records.jsonl",
        )
    faults.add("not a JSON object", broken)
    faults.check()
    if not records:
        raise DatasetUnreadable(f"{path}: the file is empty")
    names = _choose(list(dict.fromkeys(key for r in records for key in r)), wanted, str(path))
    values = {
        name: _as_texts(name, (record.get(name) for record in records), numbers, faults)
        for name in names
    }
    faults.check()
    return Table(str(path), numbers, values)


def _read_parquet(path: Path, wanted: Collection[str] | None) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = _choose(file.schema_arrow.names, wanted, str(path))
            table = file.read(columns=names)
    except pa.ArrowException:
        raise DatasetUnreadable(f"{path}: not a Parquet file, or a damaged one") from None
    values = {}
    for name in names:
        column = table.column(name)
        try:
            values[name] = column.cast(pa.string()).fill_null("").to_pylist()
        except pa.ArrowException:
            raise DatasetUnreadable(
                f"{path}: column {name!r} of type {column.type} can't be read as text"
            ) from None
    return Table(str(path), range(1, table.num_rows + 1), values)


def _read_query(url: str, query: str, folder: Path, wanted: Collection[str]) -> Table:
    import sqlalchemy as sa

    source = "the SQL query"
    try:
        address = sa.make_url(url)
        if address.get_backend_name() == "sqlite" and address.database not in (
            None,
            "",
            ":memory:",
        ):
            file = folder / str(address.database)
            if not file.is_file():  # SQLite would create it
                raise DatasetUnreadable(f"{file}: no such database file")
            address = address.set(database=str(file))
        engine = sa.create_engine(address, poolclass=sa.pool.NullPool)
        # The query is the site's own text: no bind parameters, so ':' and '%' mean themselves.
        options = {"no_parameters": True}
        with engine.connect() as connection:
            result = connection.exec_driver_sql(query, execution_options=options)
            names = _choose(list(result.keys()), wanted, source)
            rows = result.columns(*names).all()
    except (sa.exc.SQLAlchemyError, ImportError) as exc:
        # Messages of drivers quote host names, users and statements: only the kind is told.
        kind = type(getattr(exc, "orig", None) or exc).__name__
        raise DatasetUnreadable(f"{source} failed: {kind}") from None
    numbers, faults = range(1, len(rows) + 1), Faults(source)
    values = {
        name: _as_texts(name, (row[place] for row in rows), numbers, faults)
        for place, name in enumerate(names)
    }
    faults.check()
    return Table(source, numbers, values)


def _read_text(path: Path) -> str:
    """The text of a file, without a byte-order mark."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        for start, (kind, remedy) in _NO_TEXT.items():
            if content.startswith(start):
                raise DatasetUnreadable(
                    f"{path} is {kind}, not UTF-8 text", remedy=remedy
                ) from None
        line = content.count(b"\n", 0, exc.start) + 1
        raise DatasetUnreadable(
            f"{path}: not UTF-8 text at line {line}",
            remedy="Save it as UTF-8; iconv -f WINDOWS-1252 -t UTF-8 does, if it came from Windows.",
        ) from None


def _choose(
    present: Sequence[str], wanted: Collection[str] | None, source: str, hint: str = ""
) -> list[str]:
    """The columns to read. Raises `ColumnMissing`, without quoting what is present."""
    names = list(dict.fromkeys(present if wanted is None else wanted))
    missing = [name for name in names if name not in present]
    if missing:
        listed = ", ".join(map(repr, missing))
        raise ColumnMissing(f"{source} has no column {listed} among its {len(present)}{hint}")
    twice = [name for name in names if list(present).count(name) > 1]
    if twice:
        raise ColumnMissing(f"{source} has the column {twice[0]!r} more than once")
    return names


def _as_texts(
    column: str, values: Iterable[Any], numbers: Sequence[int], faults: Faults
) -> list[str]:
    texts = [_as_text(value) for value in values]
    bad = [number for number, text in zip(numbers, texts, strict=True) if text is None]
    faults.add("not plain text", bad, column=column)
    return [text or "" for text in texts]


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_text(value: Any) -> str | None:
    """A plain value as text; None if it is a list, an object or bytes."""
    if isinstance(value, str):
        # JSON can spell half a surrogate pair, which is no character and has no UTF-8 form.
        return value if value.isascii() or _encodable(value) else None
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, Decimal, date, time, UUID)):
        return str(value)
    return None
