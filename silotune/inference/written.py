"""Records with the answers of a model beside them, as CSV, JSON lines or Parquet.

Values keep what they are where the output has types. Without types, what is nested is JSON text.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from silotune.data.streams import RecordBlock, format_of
from silotune.data.values import text_of
from silotune.errors import DatasetUnreadable
from silotune.inference.errors import AnswersInTheWay
from silotune.inference.records import Given
from silotune.trust.files import sync_directory

if TYPE_CHECKING:
    import pyarrow as pa

WRITTEN = ("csv", "jsonl", "parquet")
"""Formats that answers are written in."""

Answer = Mapping[str, Any]
"""What is added to a record: ``prediction``, perhaps ``probabilities`` by label, perhaps more."""

Revise = Callable[[RecordBlock, Sequence[Answer | None]], RecordBlock]
"""What becomes of records, once their answers are known."""

_Blocks = Iterable[tuple[RecordBlock, Sequence[Mapping[str, Any]]]]


def output_format(out: Path) -> str:
    """The format of answers in a file of this name. Raises `DatasetUnreadable`."""
    if out.suffix in {".gz", ".zst"} or (kind := format_of(out)) not in WRITTEN:
        raise DatasetUnreadable(
            f"{out}: answers can't be written like this",
            remedy="Give an --out that ends in .csv, .jsonl or .parquet.",
        )
    return kind


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns are written.

    Attributes
    ----------
    given : mapping of str to frozenset of str
        The input's, in their order, with the types of their values.
    labels : tuple of str
        Those that have a probability.
    extra : tuple of str
        Names in an answer beside ``prediction`` and ``probabilities``.
    prefix : str
        Before the names of what is added.
    nested : bool
        Probabilities are one object, and not a column each.
    """

    given: Mapping[str, frozenset[str]]
    labels: tuple[str, ...]
    extra: tuple[str, ...]
    prefix: str
    nested: bool

    @property
    def added(self) -> list[str]:
        """The columns that are added."""
        return list(self.values(None))

    def require_new(self) -> None:
        """Check that none of them is there. Raises `AnswersInTheWay`."""
        if twice := [name for name in self.added if name in self.given]:
            raise AnswersInTheWay(
                f"the file has a column {twice[0]!r} already",
                remedy="Give --prefix, which stands before the names of the added columns.",
            )

    def values(self, answer: Answer | None) -> dict[str, Any]:
        """What is added to a record, by column."""
        found = answer or {}
        shares = found.get("probabilities")
        added = {"prediction": found.get("prediction")}
        if self.labels and self.nested:
            added["probabilities"] = shares
        else:
            added |= {f"probability_{label}": (shares or {}).get(label) for label in self.labels}
        added |= {name: found.get(name) for name in self.extra}
        return {self.prefix + name: value for name, value in added.items()}


def write(
    out: Path,
    kind: str,
    given: Given,
    columns: Columns,
    answers: Callable[[], Iterator[Answer | None]],
    *,
    revise: Revise,
) -> None:
    """Write all records of a file with their answers to `out`, in one step and for its owner only."""
    made = answers()
    pairs = ((block, [*islice(made, len(block.rows))]) for block in given.read())
    blocks = ((revise(block, found), [*map(columns.values, found)]) for block, found in pairs)
    temporary = out.with_name(f".{out.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        match kind:
            case "csv":
                _write_csv(file, blocks, columns, delimiter=given.delimiter)
            case "jsonl":
                _write_lines(file, blocks)
            case _:
                _write_parquet(file, blocks, _schema(columns, answers))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(out)
    sync_directory(out.absolute().parent)


def _write_csv(file: IO[bytes], blocks: _Blocks, columns: Columns, *, delimiter: str) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    names = list(columns.given)
    writer.writerow([*names, *columns.added])
    for block, added in blocks:
        for record, values in zip(block.records, added, strict=True):
            row = [_cell(record.get(name)) for name in names]
            writer.writerow([*row, *map(_cell, values.values())])
    text.detach()


def _cell(value: Any) -> str:
    """A value in a table of text; what is nested as JSON."""
    if isinstance(value, str):
        return value
    text = text_of(value)
    return _json(value) if text is None else text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON has no form for."""
    if isinstance(value, (date, time, Decimal)):
        return text_of(value)
    return value.hex() if isinstance(value, bytes) else str(value)


def _write_lines(file: IO[bytes], blocks: _Blocks) -> None:
    for block, added in blocks:
        for record, values in zip(block.records, added, strict=True):
            file.write(_json({**record, **values}).encode() + b"\n")


def _schema(
    columns: Columns, answers: Callable[[], Iterator[Answer | None]]
) -> dict[str, pa.DataType]:
    """The types of the columns that have none yet: of the added, and of a file without types."""
    import pyarrow as pa

    found = {name: _type(kinds) for name, kinds in columns.given.items()}
    numeric = all(isinstance(answer["prediction"], float) for answer in answers() if answer)
    shares = {f"{columns.prefix}probability_{label}" for label in columns.labels}
    for name in columns.added:
        is_number = name in shares or (name == f"{columns.prefix}prediction" and numeric)
        found[name] = pa.float64() if is_number else pa.string()
    return found


def _type(kinds: frozenset[str]) -> pa.DataType:
    import pyarrow as pa

    types = {
        frozenset({"bool"}): pa.bool_(),
        frozenset({"int"}): pa.int64(),
        frozenset({"float"}): pa.float64(),
        frozenset({"int", "float"}): pa.float64(),
    }
    return types.get(kinds - {"NoneType"}, pa.string())


def _write_parquet(file: IO[bytes], blocks: _Blocks, types: Mapping[str, pa.DataType]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for block, added in blocks:
            batch = block.arrow
            if batch is None:
                batch = pa.record_batch(
                    {
                        name: _array(block.records, name, types[name])
                        for name in types
                        if name not in added[0]
                    }
                )
            for name in added[0]:
                batch = batch.append_column(name, _array(added, name, types[name]))
            writer = writer or pq.ParquetWriter(file, batch.schema)
            writer.write_batch(batch)
    finally:
        if writer is not None:
            writer.close()


def _array(records: Sequence[Mapping[str, Any]], name: str, kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    values = [record.get(name) for record in records]
    if pa.types.is_string(kind):
        values = [None if value is None else _cell(value) for value in values]
    return pa.array(values, kind)
