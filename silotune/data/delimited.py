"""CSV and its relatives, read as a stream.

Rows are numbered as a spreadsheet does: the header is row 1 if no rows are skipped, blank rows count,
and a quoted line break begins no row.
"""

from __future__ import annotations

import csv
import re
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from silotune.data.shape import Shape, not_text, open_text
from silotune.data.table import Faults, Table, choose, empty_table, of_texts
from silotune.data.values import encodable
from silotune.errors import DatasetUnreadable

# The default of 128 KiB is shorter than a long clinical note.
_LONGEST_FIELD = 2**31 - 1

# Fewer than the objects after which Python looks for garbage: with more it looks at all of them over and
# over, which doubles the time.
_AT_ONCE = 500

# Excel writes, and reads, a first line that names the delimiter.
_SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)

_WITH_COMMA = re.compile(r"\s*-?(?:\d+|\d{1,3}(?:\.\d{3})+),\d+\s*").fullmatch

Row = list[str]
Rows = list[Row]


def read_csv(path: Path, wanted: Collection[str] | None, shape: Shape) -> Table:
    """Some columns of a delimited file, or all of them when `wanted` is None.

    Raises
    ------
    DatasetUnreadable
        It is not of its encoding or, read strictly, no valid CSV.
    ColumnMissing
        A wanted column is not there, or is there twice.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    with open_text(path, shape) as text:
        try:
            return _Reader(path, text, shape).read(wanted)
        except UnicodeDecodeError:
            raise not_text(path, shape) from None


class _Reader:
    """One pass over a file."""

    def __init__(self, path: Path, text: TextIO, shape: Shape) -> None:
        self._path, self._shape = path, shape
        for _ in range(shape.skip_rows):
            text.readline()
        first = text.readline()
        named = _SEPARATOR.fullmatch(first)
        self._delimiter = named[1] if named else shape.delimiter
        lines = text if named else chain([first], text)
        self._reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
        self._lines_before = shape.skip_rows + bool(named)
        self._last = self._lines_before
        self._broken = False

    def read(self, wanted: Collection[str] | None) -> Table:
        batches = self._batches()
        numbers, rows = next(batches, ((), []))
        if len(rows) < 2 and self._broken:
            raise self._invalid()
        if not rows:
            return empty_table(self._path, wanted, strict=self._shape.strict)
        header = [name.strip() for name in rows[0]]
        if not all(map(encodable, header)):
            raise not_text(self._path, self._shape)
        hint = f"; is row {numbers[0]} a header, and is the delimiter {self._delimiter!r}?"
        names = choose(header, wanted, str(self._path), hint)
        faults = Faults(str(self._path))
        used, columns = self._columns(
            chain([(numbers[1:], rows[1:])], batches), header, names, faults
        )
        if self._broken:
            if self._shape.strict:
                raise self._invalid()
            after = "not valid CSV, and nothing behind it was read, from"
            faults.add(after, [self._last + 1])
        return of_texts(str(self._path), used, columns, faults, self._shape.rule)

    def _columns(
        self,
        batches: Iterator[tuple[Sequence[int], Rows]],
        header: Row,
        names: Sequence[str],
        faults: Faults,
    ) -> tuple[Sequence[int], dict[str, list[str]]]:
        """The numbers and values of the rows that have as many fields as the header."""
        width, places = len(header), [header.index(name) for name in names]
        columns: list[list[str]] = [[] for _ in names]
        used, odd = array("q"), array("q")
        for numbers, rows in batches:
            whole_numbers, whole = numbers, rows
            if set(map(len, rows)) != {width}:
                odd.extend(_those(numbers, rows, lambda row: len(row) != width)[0])
                whole_numbers, whole = _those(numbers, rows, lambda row: len(row) == width)
            used.extend(whole_numbers)
            fields = list(zip(*whole, strict=True)) or [()] * width
            for column, place in zip(columns, places, strict=True):
                column.extend(fields[place])
        faults.add(f"not {width} fields as in the header", odd)
        if self._shape.decimal == ",":
            columns = [[*map(_with_point, column)] for column in columns]
        return used, dict(zip(names, columns, strict=True))

    def _batches(self) -> Iterator[tuple[Sequence[int], Rows]]:
        """The rows that are not blank, some at a time, and their numbers."""
        while not self._broken:
            rows: Rows = []
            try:
                rows.extend(islice(self._reader, _AT_ONCE))
            except csv.Error:
                self._broken = True
            if not rows:
                return
            numbers = range(self._last + 1, self._last + 1 + len(rows))
            self._last = numbers[-1]
            # A spreadsheet writes its trailing blank rows too; they hold no record.
            if all(map(any, rows)):
                yield numbers, rows
            elif any(map(any, rows)):
                yield _those(numbers, rows, any)

    def _invalid(self) -> DatasetUnreadable:
        line = self._reader.line_num + self._lines_before
        return DatasetUnreadable(f"{self._path}: not valid CSV at line {line}")


def _those(
    numbers: Sequence[int], rows: Rows, wanted: Callable[[Row], bool]
) -> tuple[Sequence[int], Rows]:
    pairs = [(number, row) for number, row in zip(numbers, rows, strict=True) if wanted(row)]
    return [number for number, _ in pairs], [row for _, row in pairs]


def _with_point(text: str) -> str:
    """A number with a decimal comma (and perhaps points between thousands) as others write it."""
    if _WITH_COMMA(text) is None:
        return text
    return text.replace(".", "").replace(",", ".")
