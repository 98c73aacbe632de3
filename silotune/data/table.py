"""A table of strings as every reader gives it, and what is told of rows that are not in it.

Messages name files, rows and columns, and never show what a row holds: not even the header, which in a
file that lacks one is a record.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.data.values import NEWEST, Rule, canonical_column, encodable, text_of
from silotune.errors import ColumnMissing, DataError, DatasetUnreadable, RecordInvalid

_SHOWN = 5

# A row's number among the parts of a folder: the part's place above these bits, its own number below.
_ROW_BITS = 40


def row_of_part(part: int, row: int) -> int:
    """The number of a row of the `part`-th file of a folder."""
    return part << _ROW_BITS | row


@dataclass(frozen=True)
class LeftOut:
    """Rows of a source that are not used, and why. Private: it is for people at the site.

    Attributes
    ----------
    problem : str
        What is wrong with them.
    rows : tuple of int
        Their numbers, as the reader of the source counts (`row_of_part` where it has parts).
    column : str or None
        The column that it was seen in.
    values : mapping of str to int
        How often which label occurs, where the label is what is wrong: for a local terminal only.
    parts : sequence of str
        The files of a source that is a folder.
    """

    problem: str
    rows: tuple[int, ...]
    column: str | None = None
    values: Mapping[str, int] = field(default_factory=dict)
    parts: Sequence[str] = ()

    def __str__(self) -> str:
        where = f"column {self.column!r}: " if self.column is not None else ""
        return f"{where}{self.problem} in {rows_in_words(self.rows, self.parts)}"

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
        The file, folder or query, as messages name it.
    parts : sequence of str
        The files of a folder.
    """

    source: str
    found: list[LeftOut] = field(default_factory=list)
    parts: Sequence[str] = ()

    def again(self) -> Faults:
        """A copy that goes on by itself."""
        return Faults(self.source, list(self.found), self.parts)

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
            found = LeftOut(problem, tuple(rows), column, Counter(values), self.parts)
            self.found.append(found)

    def check(self, error: type[DataError] = RecordInvalid) -> None:
        """Raise `error` if any fault was noted."""
        if self.found:
            listed = "\n".join(f"  - {fault}" for fault in self.found)
            raise error(f"{self.source}:\n{listed}")


def rows_in_words(rows: Sequence[int], parts: Sequence[str] = ()) -> str:
    """The first few rows and their number: ``row 7``, ``3 rows (2, 5, 9)``, ``9 rows (2, ...)``."""
    if len(rows) == 1:
        return f"row {_place(rows[0], parts)}"
    first = ", ".join(_place(row, parts) for row in rows[:_SHOWN])
    return f"{len(rows)} rows ({first}{', ...' if len(rows) > _SHOWN else ''})"


def _place(row: int, parts: Sequence[str]) -> str:
    own = str(row & (1 << _ROW_BITS) - 1)
    return f"{own} of {parts[row >> _ROW_BITS]}" if parts else own


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
        The file, folder or query, as messages name it.
    rows : sequence of int
        The number of each record in the source, for messages.
    columns : mapping of str to sequence of str
        The values by column; what is missing is the empty string.
    faults : Faults
        Rows that were left out.
    """

    source: str
    rows: Sequence[int]
    columns: Mapping[str, Sequence[str]]
    faults: Faults = field(default_factory=lambda: Faults(""))


def choose(
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


def as_table(
    source: str,
    numbers: Sequence[int],
    values: Mapping[str, Iterable[Any]],
    faults: Faults,
    rule: Rule = NEWEST,
    *,
    lists: Collection[str] = (),
) -> Table:
    """A table of the rows whose values are all plain: strings, numbers, dates, truths or missing.

    In the columns `lists` a list or an object is its JSON.
    """
    plain = {
        name: map(_json, column) if name in lists else column for name, column in values.items()
    }
    texts = {name: [text_of(value, rule) for value in column] for name, column in plain.items()}
    bad: set[int] = set()
    for name, column in texts.items():
        rows = [place for place, text in enumerate(column) if text is None]
        faults.add("not plain text", [numbers[place] for place in rows], column=name)
        bad.update(rows)
    kept = [place for place in range(len(numbers)) if place not in bad] if bad else None
    if kept is not None:
        numbers = [numbers[place] for place in kept]
        texts = {name: [column[place] for place in kept] for name, column in texts.items()}
    columns = {name: [text or "" for text in column] for name, column in texts.items()}
    return Table(source, numbers, columns, faults)


def _json(value: Any) -> Any:
    """The JSON of a list or an object; what is neither as it is, and what has no JSON too."""
    if not isinstance(value, (list, tuple, dict)):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return value


def of_texts(
    source: str,
    numbers: Sequence[int],
    columns: Mapping[str, Sequence[str]],
    faults: Faults,
    rule: Rule = NEWEST,
) -> Table:
    """`as_table` of what is text already: without rows that have bytes which are no text."""
    if not all(_plain(column) for column in columns.values()):
        return as_table(source, numbers, columns, faults, rule)
    if rule > 1:
        columns = {name: canonical_column(column) for name, column in columns.items()}
    return Table(source, numbers, columns, faults)


def _plain(column: Sequence[str]) -> bool:
    return all(map(str.isascii, column)) or all(map(encodable, column))


def empty_table(path: Path, wanted: Collection[str] | None, *, strict: bool) -> Table:
    """A file without anything in it: no records, to a site."""
    if strict:
        raise DatasetUnreadable(f"{path}: the file is empty")
    return Table(str(path), [], {name: [] for name in wanted or ()}, Faults(str(path)))


def joined(source: str, tables: Sequence[Table], parts: Sequence[str]) -> Table:
    """The tables of a folder's parts as one, in their order."""
    faults = Faults(source, parts=parts)
    rows: list[int] = []
    columns: dict[str, list[str]] = {name: [] for name in tables[0].columns}
    for part, table in enumerate(tables):
        rows.extend(row_of_part(part, row) for row in table.rows)
        for name, column in columns.items():
            column.extend(table.columns[name])
        faults.found.extend(
            LeftOut(
                f.problem, tuple(row_of_part(part, r) for r in f.rows), f.column, f.values, parts
            )
            for f in table.faults.found
        )
    return Table(source, rows, columns, faults)
