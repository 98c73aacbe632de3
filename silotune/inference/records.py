"""A file of records as a trained model is given it: which columns play which role, block by block."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from silotune.data.columns import ColumnsConfig, columns_in
from silotune.data.image_files import images_below, look_at_images
from silotune.data.nested import root_of
from silotune.data.roles import Sieve, by_role, list_columns
from silotune.data.site import DatasetConfig
from silotune.data.streams import RecordBlock, delimiter_of, format_of, stream
from silotune.data.table import LeftOut, Table, rows_in_words
from silotune.errors import ColumnMissing, RecordInvalid, TooFewRecords
from silotune.trust.files import file_sha256

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
class SomeRecords:
    """A block of records by role.

    Attributes
    ----------
    examples : sequence of mapping
        By role; perhaps with ``unit`` and ``group``.
    rows : sequence of int
        Their numbers in the source.
    records : int
        How many the source has here, with those that are left out.
    left_out : sequence of LeftOut
        What is, and why.
    """

    examples: Sequence[Mapping[str, str]]
    rows: Sequence[int]
    records: int
    left_out: Sequence[LeftOut] = ()


class LabelledRecords(Protocol):
    """Where labelled records come from: a file, or a part of a site's dataset."""

    @property
    def title(self) -> str:
        """As pages and terminals call it."""

    @property
    def digest(self) -> str:
        """A hash that tells it from others."""

    @property
    def unit_column(self) -> str:
        """What says whose records they are; "" if nothing does."""

    @property
    def group_column(self) -> str:
        """What groups them; "" if nothing does."""

    def size(self) -> int:
        """How many there are; what is wrong with all of them is told here."""

    def some(self) -> Iterator[SomeRecords]:
        """The records, some at a time."""


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
    separator : str, optional
        Between two of several labels, where they are no list.
    images : Path, optional
        The folder that the paths of images are below; the file's own folder by default.
    """

    path: Path
    roles: Mapping[str, str]
    labels: tuple[str, ...] = ()
    strict: bool = True
    separator: str | None = None
    images: Path | None = None
    at_once: int = field(default=256, repr=False)

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
            columns=ColumnsConfig(labels=self.roles.get("labels")),
            label_separator=self.separator if "labels" in self.roles else None,
            declared_units=1,
        )

    @cached_property
    def _wanted(self) -> list[str]:
        return list(
            dict.fromkeys(name for text in self.roles.values() for name in columns_in(text))
        )

    def read(self) -> Iterator[RecordBlock]:
        """The records some at a time, as the file has them.

        Raises
        ------
        DatasetUnreadable, RecordInvalid
            The file, or a row of it, can't be read; the message has its number, never its content.
        """
        kind = self._dataset.format
        return stream(self.path, kind, delimiter=self.delimiter, size=self.at_once)

    def table(self, block: RecordBlock, *, images: bool = True) -> Table:
        """Records by role, one row each if `strict`. `images`: whether these are looked at, too.

        Raises
        ------
        DatasetUnreadable, RecordInvalid
            As `read`.
        """
        texts = block.texts(self._wanted, lists=list_columns(self.roles))
        table = by_role(texts, self._dataset, roles=self.roles, labels=self.labels)
        if images and "image" in self.roles:
            table = self._found_images(table)
        if self.strict:
            table.faults.check()
        return table

    def blocks(self) -> Iterator[tuple[RecordBlock, Table]]:
        """The records some at a time, as `read` and as `table` give them."""
        for block in self.read():
            yield block, self.table(block)

    @property
    def title(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def digest(self) -> str:
        """SHA-256 of the file, in hex."""
        return file_sha256(self.path)

    @property
    def unit_column(self) -> str:
        """The column of units."""
        return self.roles.get("unit", "")

    @property
    def group_column(self) -> str:
        """The column of groups."""
        return self.roles.get("group", "")

    def size(self) -> int:
        """How many records there are. Raises as `outline` does."""
        return self.outline().records

    def some(self) -> Iterator[SomeRecords]:
        """What `blocks` gives by role."""
        for block, table in self.blocks():
            yield SomeRecords(
                examples=examples_of(table),
                rows=table.rows,
                records=len(block.rows),
                left_out=table.faults.found,
            )

    def _found_images(self, table: Table) -> Table:
        """With each image's whole path, and without rows whose image can't be read."""
        sieve = Sieve(table)
        folder = self.path.parent if self.images is None else self.images
        look_at_images(sieve, folder=folder, column=self.roles["image"])
        found = sieve.table()
        columns = {role: found.columns[role] for role in table.columns}
        return Table(found.source, found.rows, columns, found.faults)

    def chosen(self, rows: Sequence[int], *, first: int) -> list[tuple[int, dict[str, str]]]:
        """Records by their row, as messages number rows; the first few where none are named.

        Raises
        ------
        RecordInvalid
            A row that is named is not there, can't be read, or is empty.
        ColumnMissing, TooFewRecords, DatasetUnreadable
            As `outline`.
        """
        self.outline()
        found: dict[int, dict[str, str]] = {}
        for _, table in self.blocks():
            for row, example in zip(table.rows, examples_of(table), strict=True):
                if (row in rows or not rows) and all(text.strip() for text in example.values()):
                    found[row] = example
            if not rows and len(found) >= first:
                break
        if lacking := [row for row in rows if row not in found]:
            raise RecordInvalid(
                f"{self.path}: {rows_in_words(lacking)} not there, empty, or not to be read",
                remedy="Give rows as a spreadsheet numbers them: a header is row 1.",
            )
        order = rows or list(found)[:first]
        return [(row, found[row]) for row in order]

    def outline(self) -> Outline:
        """Read all once, so that what is wrong with the file is told before anything is computed.

        Raises
        ------
        ColumnMissing
            A role's column is nowhere in it.
        TooFewRecords
            It has no record.
        DatasetUnreadable, RecordInvalid
            As `read`.
        """
        records, found = 0, dict[str, set[str]]()
        for block in self.read():
            # Images take long: where unreadable ones are left out, a few tell whether any are here.
            self.table(block, images=self.strict or not records)
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


@contextmanager
def given_by(data: Path, roles: Mapping[str, str], *, images: Path | None) -> Iterator[Given]:
    """The records of a file; or the images below a folder, listed in a table for the while."""
    if not (data.is_dir() and "image" in roles):
        yield Given(path=data, roles=roles, images=images)
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "images.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["image"], *([name] for name in images_below(data))])
        yield Given(path=path, roles={"image": "image"}, images=data)


def examples_of(table: Table) -> list[dict[str, str]]:
    """The rows of a table by role, as tasks take them."""
    names = list(table.columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]


def _kind(value: object) -> str:
    long = isinstance(value, int) and abs(value) > _EXACT
    return "long" if long else type(value).__name__
