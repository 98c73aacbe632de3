"""A file of records read block by block, each record with all that the source says of it.

For whoever gives every record back with something added: memory holds one block, columns keep their
order, and values their type where the format has types. Which text a value is to a model is decided as
it was for training (`silotune.data.table.as_table`, `silotune.data.roles`). A bad row refuses
the file, by its number: somebody waits for an answer to each.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.data.delimited import stream_csv
from silotune.data.json_records import stream_json
from silotune.data.nested import finder
from silotune.data.parts import told
from silotune.data.shape import Shape, open_text
from silotune.data.site import Format
from silotune.data.sources import read_file
from silotune.data.table import Faults, Table, as_table, choose
from silotune.errors import DatasetUnreadable

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".xlsx": "excel",
}
"""The format of a file by the end of its name."""

_PACKED = frozenset({".gz", ".zst"})
_DELIMITERS = ",;\t|"

Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RecordBlock:
    """Some consecutive records.

    Attributes
    ----------
    source : str
        The file, as messages name it.
    rows : sequence of int
        Their numbers in it, as its reader counts.
    records : sequence of mapping
        Each record's values by column, in the order of the file.
    arrow : RecordBatch or None
        The same, with types, where the file has them.
    """

    source: str
    rows: Sequence[int]
    records: Sequence[Record]
    arrow: pa.RecordBatch | None = None

    def texts(self, columns: Sequence[str], *, lists: Collection[str] = ()) -> Table:
        """Some columns (or paths into them) as texts, those of `lists` perhaps as JSON.

        Raises
        ------
        RecordInvalid
            A value is not plain text.
        """
        finders = {name: finder(name, whole=name in lists) for name in columns}
        values = {name: map(find, self.records) for name, find in finders.items()}
        found = as_table(self.source, self.rows, values, Faults(self.source), lists=lists)
        found.faults.check()
        return found


def format_of(path: Path) -> Format:
    """The format that a file's name says, perhaps packed. Raises `DatasetUnreadable`."""
    name = Path(path.stem) if path.suffix.lower() in _PACKED else path
    kind = FORMATS.get(name.suffix.lower())
    if kind is None:
        raise DatasetUnreadable(
            f"{path}: the end of the name says no format",
            remedy=f"Give a file that ends in {', '.join(FORMATS)}, perhaps with .gz behind it.",
        )
    return kind


def delimiter_of(path: Path) -> str:
    """What parts the fields of a CSV file's first line: what makes the most of it."""
    with told(path), open_text(path, Shape()) as text:
        first = text.readline()
    return max(_DELIMITERS, key=lambda sign: len(next(csv.reader([first], delimiter=sign), [])))


def stream(
    path: Path, kind: Format, *, delimiter: str = ",", size: int = 256
) -> Iterator[RecordBlock]:
    """The records of a file, `size` at a time.

    Only CSV, JSON lines and Parquet are read as they come; of other formats the whole is read first.

    Raises
    ------
    DatasetUnreadable, ColumnMissing, RecordInvalid
        As `silotune.data.sources.read_file`; nothing behind the row is read.
    """
    shape = Shape(delimiter=delimiter, strict=True)
    with told(path):
        match kind:
            case "csv":
                yield from _csv(path, shape, size)
            case "jsonl" | "json":
                yield from _json(path, shape, size, array=kind == "json")
            case "parquet":
                yield from _parquet(path, size)
            case _:
                yield from _whole(path, kind, size)


def _csv(path: Path, shape: Shape, size: int) -> Iterator[RecordBlock]:
    for header, rows, fields in stream_csv(path, shape, size=size):
        choose(header, header, str(path))
        yield RecordBlock(str(path), rows, [dict(zip(header, row, strict=True)) for row in fields])


def _json(path: Path, shape: Shape, size: int, *, array: bool) -> Iterator[RecordBlock]:
    found = stream_json(path, shape, array=array)
    while some := list(islice(found, size)):
        yield RecordBlock(str(path), [number for number, _ in some], [record for _, record in some])


def _parquet(path: Path, size: int) -> Iterator[RecordBlock]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 1
    try:
        with pq.ParquetFile(path) as file:
            choose(file.schema_arrow.names, None, str(path))
            for batch in file.iter_batches(size):
                rows = range(first, first + batch.num_rows)
                yield RecordBlock(str(path), rows, batch.to_pylist(), batch)
                first = rows.stop
    except pa.ArrowException:
        raise DatasetUnreadable(f"{path}: not a Parquet file, or a damaged one") from None


def _whole(path: Path, kind: Format, size: int) -> Iterator[RecordBlock]:
    table = read_file(path, kind=kind)
    records = [
        dict(zip(table.columns, row, strict=True))
        for row in zip(*table.columns.values(), strict=True)
    ]
    for start in range(0, len(records), size):
        end = start + size
        yield RecordBlock(table.source, table.rows[start:end], records[start:end])
