"""What the readers of records share: columns that fill row by row, and records that others replace.

The same record often stands twice in an export: sent again, corrected, or taken back. A model must not
learn what its author took back, so of records with one name only the newest is used, or none.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from silotune.data.parts import parts_of
from silotune.data.table import Faults, Table, row_of_part
from silotune.data.values import Rule, canonical_column
from silotune.errors import ColumnMissing, DatasetUnreadable

REPLACED = "replaced by another version of the same record"


class Gathering:
    """Fills columns record by record, over the files of a dataset; counts by reason what is left out.

    Parameters
    ----------
    path : Path
        The file or folder.
    columns : collection of str
        The columns to fill.
    """

    def __init__(self, path: Path, columns: Collection[str]) -> None:
        self.source, self._files = str(path), parts_of(path)
        self._parts = tuple(str(part.relative_to(path)) for part in self._files if part != path)
        self.names = tuple(dict.fromkeys(columns))
        self.rows = array("q")
        self._part = self._last = 0
        self._columns: dict[str, list[str]] = {name: [] for name in self.names}
        self._left_out: dict[str, array[int]] = defaultdict(lambda: array("q"))
        self._broken: list[str] = []

    def parts(self) -> Iterator[Path]:
        """The files, one after the other: rows that are given meanwhile are rows of that file."""
        for number, part in enumerate(self._files):
            self._part, self._last = number, 0
            yield part

    def row(self, number: int | None = None) -> int:
        """A record's row: the number of its line, or the next number where records have no lines."""
        self._last = self._last + 1 if number is None else number
        return row_of_part(self._part, self._last)

    def add(self, row: int, values: Iterable[str]) -> None:
        """Take a record: its row and its values, one a column."""
        self.rows.append(row)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def leave_out(self, row: int, reason: str) -> None:
        """Count a record that is not used; the reason says nothing that the record holds."""
        self._left_out[reason].append(row)

    def break_off(self, reason: str, *, strict: bool) -> None:
        """Note that a file could not be read from a record on; with `strict` it is an error."""
        told = f"{self._files[self._part]}: {reason}"
        if strict:
            raise DatasetUnreadable(told)
        self._broken.append(told)
        self.leave_out(self.row(), f"{reason}, and nothing behind it was read, from")

    def table(self, rule: Rule, *, without: Collection[int] = ()) -> Table:
        """What was taken, without some of its rows: those that another record replaces.

        Raises
        ------
        DatasetUnreadable
            Nothing but broken files was found.
        """
        if self._broken and not self.rows and len(self._left_out) == len(set(self._broken)):
            raise DatasetUnreadable(self._broken[0])
        faults = Faults(self.source, parts=self._parts)
        for reason, rows in self._left_out.items():
            faults.add(reason, rows)
        kept: Sequence[int] = self.rows
        columns = self._columns
        if without:
            places = [place for place, row in enumerate(self.rows) if row not in without]
            faults.add(REPLACED, [row for row in self.rows if row in without])
            columns = {name: [column[p] for p in places] for name, column in columns.items()}
            kept = array("q", (self.rows[place] for place in places))
        if rule > 1:
            columns = {name: list(canonical_column(column)) for name, column in columns.items()}
        return Table(self.source, kept, columns, faults)


class Versions:
    """Finds which rows are older versions of others, in 24 bytes a row.

    Names are kept as 64 bits of a hash: of a million records, that two fall together has a
    probability of 3e-8.
    """

    def __init__(self) -> None:
        self._names, self._rows, self._times = array("Q"), array("q"), array("d")
        self._taken_back = array("Q")

    def add(self, name: str, row: int, *, time: float = float("-inf")) -> None:
        """Note a version of a record: of two, the later one counts; at one time, the later row."""
        self._names.append(_hashed(name))
        self._rows.append(row)
        self._times.append(time)

    def take_back(self, name: str) -> None:
        """Note that another record replaces or deletes this one, whichever comes first."""
        self._taken_back.append(_hashed(name))

    def older(self) -> frozenset[int]:
        """The rows that a newer version replaces, and those that were taken back."""
        if not self._names:
            return frozenset()
        names, rows = np.asarray(self._names), np.asarray(self._rows)
        order = np.lexsort((rows, np.asarray(self._times), names))
        followed = order[:-1][names[order[:-1]] == names[order[1:]]]
        taken_back = np.flatnonzero(np.isin(names, np.asarray(self._taken_back, dtype=np.uint64)))
        return frozenset(rows[np.concatenate([followed, taken_back])].tolist())


def _hashed(name: str) -> int:
    data = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def require_known(wanted: Collection[str], known: Collection[str], source: str) -> None:
    """Raise `ColumnMissing` for a column that a format does not have; its own are named."""
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ColumnMissing(
            f"{source} has no column {', '.join(map(repr, missing))}: the columns of this format "
            f"are {', '.join(known)}"
        )
