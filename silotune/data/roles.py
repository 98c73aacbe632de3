"""A dataset by role: what its columns, as site.toml maps them, say to a plan.

From the columns of a source come the roles that a plan asks for: spaces around values don't count, a
word that only says that there is nothing is nothing, a text may be put together of several columns or
be a list of words (`silotune.data.structured` has the roles whose value is a list), labels get the names
that plans use, and a given split its own three. Rows whose label or side is none of those are left out
and counted. Whether a row may lack a value is for the reader of the roles to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import compress, repeat
from pathlib import Path

import numpy as np

from silotune.data.columns import LISTS, STANDS_FOR, columns_in, pieces_of
from silotune.data.site import DatasetConfig
from silotune.data.sources import read_dataset
from silotune.data.structured import (
    UNKNOWN,
    UNKNOWN_LABEL,
    Naming,
    Unfit,
    labels_text,
    messages_text,
    spans_text,
    words_text,
)
from silotune.data.table import Table
from silotune.data.values import MISSING, NEWEST, Rule, canonical, without_missing

SIDES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""What a column of the role split may say, in small letters."""

ANY_OTHER = "*"
"""Among the labels that site.toml maps: whatever else stands in a list of them."""

_NAMED = frozenset({"label", "labels"})


def read_roles(
    dataset: DatasetConfig,
    *,
    folder: Path,
    roles: Mapping[str, str],
    labels: Collection[str] = (),
    rule: Rule = NEWEST,
    strict: bool = False,
) -> Table:
    """Read a dataset by role.

    Parameters
    ----------
    dataset : DatasetConfig
        What is read; relative paths start from `folder`.
    roles : mapping of str to str
        The column, or the template, of each role that is wanted.
    labels : collection of str
        The labels that may occur; if empty, those that the site declares, or any.
    rule : int
        By which values become text.
    strict : bool
        As in `read_dataset`.

    Returns
    -------
    Table
        Its columns are the roles; words and tags became a text and its spans.

    Raises
    ------
    DatasetUnreadable, ColumnMissing, SiteConfigInvalid
        As `read_dataset`.
    """
    wanted = dict.fromkeys(column for text in roles.values() for column in columns_in(text))
    read = read_dataset(
        dataset, folder=folder, columns=wanted, strict=strict, rule=rule, lists=list_columns(roles)
    )
    return by_role(read, dataset, roles=roles, labels=labels, rule=rule)


def list_columns(roles: Mapping[str, str]) -> set[str]:
    """The columns whose values may be lists."""
    return {column for role, column in roles.items() if role in LISTS}


def by_role(
    read: Table,
    dataset: DatasetConfig,
    *,
    roles: Mapping[str, str],
    labels: Collection[str] = (),
    rule: Rule = NEWEST,
) -> Table:
    """What was read by column, by role; parameters as for `read_roles`."""
    stripped = {name: [*map(str.strip, column)] for name, column in read.columns.items()}
    allowed = tuple(labels) or dataset.declared_labels
    values = {
        role: _values(stripped, text, _words(dataset, allowed) if role in _NAMED else MISSING)
        for role, text in roles.items()
    }
    sieve = Sieve(Table(read.source, read.rows, values, read.faults.again()))
    if list_columns(roles):
        _read_lists(sieve, dataset, roles, read.columns, _naming(dataset, allowed, rule))
    if "label" in roles:
        _name_labels(sieve, dataset, roles["label"], allowed, rule)
    if "split" in roles:
        _name_sides(sieve, roles["split"])
    return sieve.table()


def _values(
    columns: Mapping[str, Sequence[str]], text: str, words: Collection[str]
) -> Sequence[str]:
    """The values of one role: of a column, or of a template's columns put together."""
    pieces = pieces_of(text)
    if pieces is None:
        return without_missing(columns[text], words)
    named = {name: without_missing(columns[name], words) for _, name in pieces if name is not None}
    parts = [repeat(literal) if name is None else named[name] for literal, name in pieces]
    together = ("".join(row).strip() for row in zip(*parts, strict=False))
    # Of parts that are all missing, what stands between them is no text.
    given = map(any, zip(*named.values(), strict=True))
    return [text if there else "" for text, there in zip(together, given, strict=True)]


def _words(dataset: DatasetConfig, allowed: Collection[str]) -> Collection[str]:
    """What a missing label may be written as: nothing that is a label here."""
    mapped = dataset.labels if isinstance(dataset.labels, Mapping) else ()
    return MISSING.difference(allowed, mapped)


def _name_labels(
    sieve: Sieve, dataset: DatasetConfig, column: str, allowed: Collection[str], rule: Rule
) -> None:
    """Give labels the names that plans use; leave out what site.toml maps to none, or doesn't map."""
    mapped = dataset.labels if isinstance(dataset.labels, Mapping) else None
    named = _names(dataset, allowed, rule)
    found = sieve.column("label")
    if mapped is not None:
        unknown = [row for row in sieve.rows() if found[row] and found[row] not in named]
        told = [found[row] for row in unknown]
        sieve.drop(unknown, "label is not among those that site.toml maps", column, told)
        unwanted = [row for row in sieve.rows() if named.get(found[row]) == ""]
        sieve.drop(unwanted, "label that site.toml leaves out", column)
    if any(written != label for written, label in named.items()):
        sieve.replace("label", [named.get(label, label) for label in found])


def _names(dataset: DatasetConfig, allowed: Collection[str], rule: Rule) -> dict[str, str]:
    """The plan's names of labels, by what the source says."""
    mapped = dataset.labels if isinstance(dataset.labels, Mapping) else None
    named = dict(mapped) if mapped is not None else {label: label for label in allowed}
    if rule > 1:
        named = {canonical(written): label for written, label in named.items()}
    return named


def _naming(dataset: DatasetConfig, allowed: Collection[str], rule: Rule) -> Naming:
    """Names labels in lists: those that are known, or any where none are declared."""
    named = _names(dataset, allowed, rule)
    wanted = {*allowed, ""}

    def name(label: str) -> str | None:
        called = named.get(canonical(label) if rule > 1 else label, named.get(ANY_OTHER))
        return called if called in wanted else None

    return name if named else lambda label: label


def _read_lists(
    sieve: Sieve,
    dataset: DatasetConfig,
    roles: Mapping[str, str],
    raw: Mapping[str, Sequence[str]],
    name: Naming,
) -> None:
    """Give roles whose value is a list their one text; leave out what is no such list."""
    if "labels" in roles:
        labels, separator = sieve.column("labels"), dataset.label_separator
        _make(
            sieve,
            roles,
            {"labels": "labels"},
            lambda row: (labels_text(labels[row], separator, name),),
        )
    if "messages" in roles:
        chats = sieve.column("messages")
        _make(sieve, roles, {"messages": "messages"}, lambda row: (messages_text(chats[row]),))
    if "spans" in roles and "text" in roles:
        texts, spans = raw[roles["text"]], sieve.column("spans")
        _make(
            sieve,
            roles,
            {"spans": "spans"},
            lambda row: (spans_text(spans[row], texts[row], name),),
        )
    if "words" in roles:
        words = sieve.column("words")
        tags = sieve.column("tags") if "tags" in roles else None
        made = {role: stands for role, stands in STANDS_FOR.items() if role in roles}
        _make(
            sieve, roles, made,
            lambda row: words_text(words[row], tags[row] if tags is not None else None, name),
        )  # fmt: skip


def _make(
    sieve: Sieve,
    roles: Mapping[str, str],
    made: Mapping[str, str],
    read: Callable[[int], Sequence[str]],
) -> None:
    """Put what `read` makes of a row in the place of the roles that it is made of."""
    first = next(iter(made))
    given, found = sieve.column(first), {}
    unfit: dict[str, list[int]] = {}
    unknown: list[str] = []
    for row in sieve.rows():
        if given[row]:
            try:
                found[row] = read(row)
            except Unfit as exc:
                unfit.setdefault(exc.problem, []).append(row)
                unknown += [exc.label] if exc.label else []
    for place, (role, stands) in enumerate(made.items()):
        values = [found[row][place] if row in found else "" for row in range(len(given))]
        sieve.replace(role, values, named=stands)
    for problem, rows in unfit.items():
        sieve.drop(
            rows, problem, roles[first], unknown if problem in {UNKNOWN, UNKNOWN_LABEL} else ()
        )


def _name_sides(sieve: Sieve, column: str) -> None:
    sides = [SIDES.get(side.lower(), side) for side in sieve.column("split")]
    odd = [row for row in sieve.rows() if sides[row] and sides[row] not in SIDES]
    sieve.drop(odd, "split is none of train, validation and test", column)
    sieve.replace("split", sides)


class Sieve:
    """Takes rows out of a table, one reason after the other."""

    def __init__(self, table: Table) -> None:
        self._source, self._numbers = table.source, table.rows
        self._values = dict(table.columns)
        self._faults = table.faults
        self._alive = np.ones(len(table.rows), dtype=np.bool_)

    def __contains__(self, role: str) -> bool:
        return role in self._values

    def column(self, role: str) -> Sequence[str]:
        """The values of a role, also of the rows that were taken out."""
        return self._values[role]

    def rows(self) -> list[int]:
        """The places of the rows that are left."""
        places: list[int] = np.flatnonzero(self._alive).tolist()
        return places

    def replace(self, role: str, values: Sequence[str], *, named: str | None = None) -> None:
        """Give a role other values, as many, and perhaps another name."""
        del self._values[role]
        self._values[named or role] = values

    def add(self, role: str, values: Sequence[str]) -> None:
        """Give every row a value of another role."""
        self._values[role] = values

    def drop(
        self,
        rows: Sequence[int],
        problem: str,
        column: str | None = None,
        values: Sequence[str] = (),
    ) -> None:
        """Take rows out that are there yet, for a reason, and perhaps tell their labels."""
        if rows:
            numbers = [self._numbers[row] for row in rows]
            self._faults.add(problem, numbers, column=column, values=values)
            self._alive[list(rows)] = False

    def table(self) -> Table:
        """What is left."""
        if self._alive.all():
            return Table(self._source, self._numbers, self._values, self._faults)
        alive = self._alive.tolist()
        columns = {role: [*compress(column, alive)] for role, column in self._values.items()}
        return Table(self._source, [*compress(self._numbers, alive)], columns, self._faults)
