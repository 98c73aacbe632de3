"""Reading tables of strings: CSV, JSON lines, Parquet, or a SQL query.

Values stay the text that the source has: no column becomes a number, so that a label ``"1"`` is the
same label in every format. A missing value is the empty string. Messages name files, rows and
columns, and never show what a row holds: not even the header, which in a file that lacks one is a
record.

Rows are numbered as the reader of the source counts them: in a CSV file as a spreadsheet does (the
header is row 1, blank rows count), in JSON lines by line, elsewhere from 1.

There are two ways to read. `read_file` refuses a table with a bad row, for somebody who can mend it.
`read_dataset` is what a site trains on: a bad row is left out and noted in `Table.faults`, because
whether a site can answer must not depend on what one record holds. What is wrong with rows is told by
place and count, never by content.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from silotune.data.site import DatasetConfig, Format, expand_url
from silotune.errors import ColumnMissing, DataError, DatasetUnreadable, RecordInvalid

_SHOWN = 5


@dataclass(frozen=True)
class LeftOut:
    """Rows of a source that are not used, and why. Private: it is for people at the site.

    Attributes
    ----------
    problem : str
        What is wrong with them.
    rows : tuple of int
        Their numbers, as the reader of the source counts.
    column : str or None
        The column that it was seen in.
    values : mapping of str to int
        How often which label occurs, where the label is what is wrong: for a local terminal only.
    """

    problem: str
    rows: tuple[int, ...]
    column: str | None = None
    values: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f"column {self.column!r}: " if self.column is not None else ""
        return f"{where}{self.problem} in {rows_in_words(self.rows)}"

    @property
    def told(self) -> str:
        """In words, with the labels that it is about: for a terminal of the site's own people."""
        if not self.values:
            return str(self)
        counted = sorted(self.values.items(), key=lambda item: (-item[1], item[0]))
        listed = ", ".join(f"{label!r} ({count})" for label, count in counted[:_SHOWN])
        more = len(counted) - _SHOWN
        return f"{self}: {listed}{f' and {more} more' if more > 0 else ''}"


@dataclass(frozen=True)
class Faults:
    """Collects the faults of one table; whoever can't leave rows out refuses it with all of them.

    Parameters
    ----------
    source : str
        The file or query, as messages name it.
    """

    source: str
    found: list[LeftOut] = field(default_factory=list)

    def add(
        self,
        problem: str,
        rows: Sequence[int],
        *,
        column: str | None = None,
        values: Sequence[str] = (),
    ) -> None:
        """Note a fault of some rows (spreadsheet numbers); of no rows, nothing is noted."""
        if rows:
            self.found.append(LeftOut(problem, tuple(rows), column, Counter(values)))

    def check(self, error: type[DataError] = RecordInvalid) -> None:
        """Raise `error` if any fault was noted."""
        if self.found:
            listed = "\n".join(f"  - {fault}" for fault in self.found)
            raise error(f"{self.source}:\n{listed}")


def rows_in_words(rows: Sequence[int]) -> str:
    """The first few rows and their number: ``row 7``, ``3 rows (2, 5, 9)``, ``9 rows (2, ...)``."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    first = ", ".join(str(row) for row in rows[:_SHOWN])
    return f"{len(rows)} rows ({first}{', ...' if len(rows) > _SHOWN else ''})"


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


def numbered(values: Iterable[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Values as dense numbers in the order of first appearance [n], and the distinct ones."""
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(value, len(numbers)) for value in values]
    return np.array(found, dtype=np.int64), list(numbers)


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
    faults : Faults
        Rows that were left out.
    """

    source: str
    rows: Sequence[int]
    columns: Mapping[str, Sequence[str]]
    faults: Faults = field(default_factory=lambda: Faults(""))


def read_dataset(
    dataset: DatasetConfig, *, folder: Path, columns: Collection[str], strict: bool = False
) -> Table:
    """Some columns of a dataset, without its bad rows; relative paths start from `folder`.

    With `strict` a file is read as by `read_file`, and its first trouble raised.

    Raises
    ------
    DatasetUnreadable, ColumnMissing
        The source can't be read at all, or is without a column: not for what a record holds.
    SiteConfigInvalid
        The URL needs an environment variable that is not set.
    """
    if dataset.format == "sql":
        assert dataset.url is not None
        assert dataset.query is not None  # validated
        return _read_query(expand_url(dataset.url), dataset.query, folder, columns)
    assert dataset.path is not None  # validated
    path = folder / dataset.path
    if strict:
        return read_file(path, kind=dataset.format, columns=columns, delimiter=dataset.delimiter)
    return _read(path, dataset.format, columns, dataset.delimiter, strict=False)


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
    table = _read(path, kind, columns, delimiter, strict=True)
    table.faults.check()
    return table


def _read(
    path: Path, kind: Format, columns: Collection[str] | None, delimiter: str, *, strict: bool
) -> Table:
    if path.is_dir():
        raise DatasetUnreadable(
            f"{path} is a folder, and path has to name one file",
            remedy="Join the parts into one file (in Python: pyarrow.parquet.write_table("
            "pyarrow.parquet.read_table(FOLDER), FILE)), or offer them as datasets of their own.",
        )
    try:
        if kind == "csv":
            return _read_csv(path, delimiter, columns, strict=strict)
        if kind == "jsonl":
            return _read_jsonl(path, columns, strict=strict)
        return _read_parquet(path, columns, strict=strict)
    except OSError as exc:
        raise DatasetUnreadable(f"{path}: {exc.strerror or type(exc).__name__}") from None


def _read_csv(path: Path, delimiter: str, wanted: Collection[str] | None, *, strict: bool) -> Table:
    csv.field_size_limit(_LONGEST_FIELD)
    text = _read_text(path, strict=strict, header=True)
    faults = Faults(str(path))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    numbered: list[tuple[int, list[str]]] = []
    try:
        # A spreadsheet writes its trailing blank rows too; they hold no record.
        numbered.extend((number, row) for number, row in enumerate(reader, start=1) if any(row))
    except csv.Error:
        if strict or not numbered:
            raise DatasetUnreadable(f"{path}: not valid CSV at line {reader.line_num}") from None
        after = numbered[-1][0] + 1
        faults.add("not valid CSV, and nothing behind it was read, from", [after])
    if not numbered:
        return _empty(path, wanted, strict=strict)
    header = [name.strip() for name in numbered.pop(0)[1]]
    hint = f"; is row 1 a header, and is the delimiter {delimiter!r}?"
    names = _choose(header, wanted, str(path), hint)
    odd = [number for number, row in numbered if len(row) != len(header)]
    faults.add(f"not {len(header)} fields as in the header", odd)
    whole = [(number, row) for number, row in numbered if len(row) == len(header)]
    places = [header.index(name) for name in names]
    values = {
        name: [row[place] for _, row in whole] for name, place in zip(names, places, strict=True)
    }
    return _without_broken_text(Table(str(path), [n for n, _ in whole], values, faults))


def _read_jsonl(path: Path, wanted: Collection[str] | None, *, strict: bool) -> Table:
    text, faults = _read_text(path, strict=strict, header=False), Faults(str(path))
    numbers, records, broken = [], [], []
    # Not splitlines(): JSON text may hold U+2028, which is no line end here.
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
    if broken and not records and text.lstrip().startswith("["):
        raise DatasetUnreadable(
            f"{path} is one JSON array, and the format jsonl is one JSON object a line",
            remedy=f"Write each object on a line of its own: jq -c '.[]' {path.name} > records.jsonl",
        )
    faults.add("not a JSON object", broken)
    if strict:
        faults.check()
    if not records and not broken:
        return _empty(path, wanted, strict=strict)
    # Which keys there are depends on the records, so a site takes an absent one as empty.
    present = list(dict.fromkeys(key for r in records for key in r))
    names = _choose(present, wanted, str(path)) if strict or wanted is None else list(wanted)
    values = {name: [record.get(name) for record in records] for name in names}
    return _as_table(str(path), numbers, values, faults)


def _empty(path: Path, wanted: Collection[str] | None, *, strict: bool) -> Table:
    """A file without anything in it: no records, to a site."""
    if strict:
        raise DatasetUnreadable(f"{path}: the file is empty")
    return Table(str(path), [], {name: [] for name in wanted or ()}, Faults(str(path)))


def _read_parquet(path: Path, wanted: Collection[str] | None, *, strict: bool) -> Table:
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
            if not strict and pa.types.is_binary(column.type):  # one record's bytes may be no text
                values[name] = [
                    (value or b"").decode("utf-8", "surrogateescape")
                    for value in column.to_pylist()
                ]
                continue
            values[name] = column.cast(pa.string()).fill_null("").to_pylist()
        except pa.ArrowException:
            raise DatasetUnreadable(
                f"{path}: column {name!r} of type {column.type} can't be read as text"
            ) from None
    rows = range(1, table.num_rows + 1)
    return _without_broken_text(Table(str(path), rows, values, Faults(str(path))))


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
    values = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    return _as_table(source, range(1, len(rows) + 1), values, Faults(source))


def _read_text(path: Path, *, strict: bool, header: bool) -> str:
    """The text of a file, without a byte-order mark; unless `strict`, a record's bad bytes stay."""
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
        if strict or (header and line == 1):
            raise DatasetUnreadable(
                f"{path}: not UTF-8 text at line {line}",
                remedy="Save it as UTF-8; iconv -f WINDOWS-1252 -t UTF-8 does, if it came from Windows.",
            ) from None
        return content.decode("utf-8-sig", "surrogateescape")


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


def _as_table(
    source: str, numbers: Sequence[int], values: Mapping[str, Iterable[Any]], faults: Faults
) -> Table:
    """A table of the rows whose values are all plain."""
    texts = {name: [_as_text(value) for value in column] for name, column in values.items()}
    bad: set[int] = set()
    for name, column in texts.items():
        rows = [place for place, text in enumerate(column) if text is None]
        faults.add("not plain text", [numbers[place] for place in rows], column=name)
        bad.update(rows)
    kept = [place for place in range(len(numbers)) if place not in bad]
    columns = {name: [column[place] or "" for place in kept] for name, column in texts.items()}
    return Table(source, [numbers[place] for place in kept], columns, faults)


def _without_broken_text(table: Table) -> Table:
    """The table without rows whose text has bytes that are no UTF-8."""
    if all(value.isascii() or _encodable(value) for c in table.columns.values() for value in c):
        return table
    return _as_table(table.source, table.rows, table.columns, table.faults)


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
