"""A file of records as a trained model is given it: which columns play which role, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from silotune.data.columns import ColumnsConfig, columns_in
from silotune.data.nested import root_of
from silotune.data.roles import by_role, list_columns
from silotune.data.site import DatasetConfig
from silotune.data.streams import RecordBlock, delimiter_of, format_of, stream
from silotune.data.table import Table
from silotune.errors import ColumnMissing, TooFewRecords

_EXACT = 2**53


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a first look at all of a file finds.

    Attributes
    ----------
    records : int
        How many.
    columns : mapping of str to frozenset of str
        All columns in their order, each with the Python types of its values; a whole number that a
        float doesn't hold is "long".
    """

    records: int
    columns: Mapping[str, frozenset[str]]


@dataclass(frozen=True, kw_only=True)
class Given:
    """A file of records.

    Parameters
    ----------
    path : Path
        CSV, JSON lines, Parquet, or another format that `silotune.data.streams` knows by its name.
    roles : mapping of str to str
        The column, or a template such as ``{title}: {body}``, of each role that is read.
    labels : tuple of str
        Those of the plan, by whose spelling labels are read.
    strict : bool
        Refuse a file with a row that can't be used, instead of leaving the row out and noting it.
    """

    path: Path
    roles: Mapping[str, str]
    labels: tuple[str, ...] = ()
    strict: bool = True
    size: int = field(default=256, repr=False)

    @cached_property
    def delimiter(self) -> str:
        """Between the fields of a CSV file."""
        return delimiter_of(self.path) if self._dataset.format == "csv" else ","

    @cached_property
    def _dataset(self) -> DatasetConfig:
        """What a site would declare of it."""
        return DatasetConfig(
            format=format_of(self.path),
            path=str(self.path),
            columns=ColumnsConfig(),
            declared_units=1,
        )

    @cached_property
    def _wanted(self) -> list[str]:
        return list(
            dict.fromkeys(name for text in self.roles.values() for name in columns_in(text))
        )

    def blocks(self) -> Iterator[tuple[RecordBlock, Table]]:
        """The records some at a time: as the file has them, and by role, one row each if `strict`.

        Raises
        ------
        DatasetUnreadable, RecordInvalid
            The file, or a row of it, can't be read; the message has its number, never its content.
        """
        kind = self._dataset.format
        for block in stream(self.path, kind, delimiter=self.delimiter, size=self.size):
            texts = block.texts(self._wanted, lists=list_columns(self.roles))
            table = by_role(texts, self._dataset, roles=self.roles, labels=self.labels)
            if self.strict:
                table.faults.check()
            yield block, table

    def outline(self) -> Outline:
        """Read all once, so that what is wrong with the file is told before anything is computed.

        Raises
        ------
        ColumnMissing
            A role's column is nowhere in it.
        TooFewRecords
            It has no record.
        DatasetUnreadable, RecordInvalid
            As `blocks`.
        """
        records, found = 0, dict[str, set[str]]()
        for block, _ in self.blocks():
            records += len(block.rows)
            for record in block.records:
                for name, value in record.items():
                    found.setdefault(name, set()).add(_kind(value))
        if not records:
            raise TooFewRecords(f"{self.path}: no records", remedy="Give a file that has some.")
        for role, text in self.roles.items():
            if missing := [n for n in columns_in(text) if root_of(n, found) not in found]:
                raise ColumnMissing(
                    f"{self.path} has no column {missing[0]!r} among its {len(found)}",
                    remedy=f"Name the column of the {role}: --column {role}=NAME.",
                )
        return Outline(records=records, columns={n: frozenset(k) for n, k in found.items()})


def examples_of(table: Table) -> list[dict[str, str]]:
    """The rows of a table by role, as tasks take them."""
    names = list(table.columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]


def _kind(value: object) -> str:
    long = isinstance(value, int) and abs(value) > _EXACT
    return "long" if long else type(value).__name__
