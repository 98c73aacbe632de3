"""CSV and its relatives, read as a stream.

Rows are numbered as a spreadsheet does: the header is row 1 if no rows are skipped, blank rows count,
and a quoted line break begins no row.
"""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from silotune.data.blocks import read_blocks
from silotune.data.parts import open_part
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
_SEPARATOR = re.compile(r'"?sep=([,;|\t])"?\s*', re.IGNORECASE)

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


def stream_csv(path: Path, shape: Shape, *, size: int) -> Iterator[tuple[Row, Sequence[int], Rows]]:
    """Some rows at a time, each time with the header and their numbers.

    Raises
    ------
    DatasetUnreadable
        As `read_csv`; and there is no header.
    RecordInvalid
        A row has another number of fields than the header.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    with open_text(path, shape) as text:
        try:
            yield from _Reader(path, text, shape).stream(size)
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
        self._lines_before = self._last = shape.skip_rows + bool(named)
        self._faults, self._odd, self._broken = Faults(str(path)), array("q"), False
        self._read_by_block = 0
        self._go_on(text if named else chain([first], text))

    def _go_on(self, lines: Iterable[str]) -> None:
        self._rows = csv.reader(lines, delimiter=self._delimiter, strict=True)

    def read(self, wanted: Collection[str] | None) -> Table:
        numbers, rows = next(self._batches(1), ((), []))
        if self._broken:
            raise self._invalid()
        if not rows:
            return empty_table(self._path, wanted, strict=self._shape.strict)
        header = [name.strip() for name in rows[0]]
        if not all(map(encodable, header)):
            raise not_text(self._path, self._shape)
        hint = f"; is row {numbers[0]} a header, and is the delimiter {self._delimiter!r}?"
        names = choose(header, wanted, str(self._path), hint)
        used, columns = array("q"), [[] for _ in names]  # type: tuple[array[int], list[list[str]]]
        places = [header.index(name) for name in names]
        with ExitStack() as stack:
            self._read_blocks(rows[0], places, used, columns, stack)
            self._read_rows(len(header), places, used, columns)
        if self._broken and (self._shape.strict or not used):
            raise self._invalid()
        self._faults.add(f"not {len(header)} fields as in the header", self._odd)
        if self._broken:
            after = "not valid CSV, and nothing behind it was read, from"
            self._faults.add(after, [self._last + 1])
        if self._shape.decimal == ",":
            columns = [[*map(_with_point, column)] for column in columns]
        values = dict(zip(names, columns, strict=True))
        return of_texts(str(self._path), used, values, self._faults, self._shape.rule)

    def stream(self, size: int) -> Iterator[tuple[Row, Sequence[int], Rows]]:
        """The rows, `size` at a time, none of which may be odd."""
        _, first = next(self._batches(1), ((), []))
        header = [name.strip() for name in first[0]] if first else []
        for numbers, rows in self._batches(size):
            self._odd.extend(_those(numbers, rows, lambda row: len(row) != len(header))[0])
            self._faults.add(f"not {len(header)} fields as in the header", self._odd)
            self._faults.check()
            yield header, numbers, rows
        if self._broken:
            raise self._invalid()

    def _read_blocks(
        self,
        header: Row,
        places: Sequence[int],
        used: array[int],
        columns: Sequence[list[str]],
        stack: ExitStack,
    ) -> None:
        """Read what is well formed, and open the file again behind it."""
        stream = stack.enter_context(open_part(self._path))
        if self._shape.encoding != "utf-8" or not stream.seekable():
            return
        for _ in range(self._last - 1):
            stream.readline()
        line = stream.readline().decode("utf-8-sig", "replace")
        if "\r" in line.removesuffix("\n").removesuffix("\r") or [
            *csv.reader([line], delimiter=self._delimiter)
        ] != [header]:
            return  # it is more than a line, or rows end otherwise
        end = stream.tell()
        for block in read_blocks(
            stream, delimiter=self._delimiter, width=len(header), places=places
        ):
            used.extend(range(self._last + 1, self._last + 1 + block.rows))
            self._last, end = self._last + block.rows, block.end
            for column, values in zip(columns, block.columns, strict=True):
                column.extend(values)
        stream.seek(end)
        self._read_by_block = end
        errors = "strict" if self._shape.strict else "surrogateescape"
        self._go_on(io.TextIOWrapper(stream, "utf-8", errors, newline=""))

    def _read_rows(
        self, width: int, places: Sequence[int], used: array[int], columns: Sequence[list[str]]
    ) -> None:
        """Read the rest, row by row; those that have another number of fields are noted."""
        for numbers, rows in self._batches(_AT_ONCE):
            whole_numbers, whole = numbers, rows
            if set(map(len, rows)) != {width}:
                self._odd.extend(_those(numbers, rows, lambda row: len(row) != width)[0])
                whole_numbers, whole = _those(numbers, rows, lambda row: len(row) == width)
            used.extend(whole_numbers)
            fields = list(zip(*whole, strict=True)) or [()] * width
            for column, place in zip(columns, places, strict=True):
                column.extend(fields[place])

    def _batches(self, size: int) -> Iterator[tuple[Sequence[int], Rows]]:
        """The rows that are not blank, some at a time, and their numbers."""
        while not self._broken:
            rows: Rows = []
            try:
                rows.extend(islice(self._rows, size))
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
        before = self._lines_before
        if self._read_by_block:
            with open_part(self._path) as stream:
                before = 0
                while stream.tell() < self._read_by_block:
                    before += len(stream.readline()) > 0
        line = self._rows.line_num + before
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
