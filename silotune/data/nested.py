"""Columns inside of columns: ``content.attachment.data`` of JSON, Parquet and Arrow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from silotune.data.formats.paths import FieldPath
from silotune.errors import ColumnMissing


def finder(name: str, *, whole: bool = False) -> Callable[[Mapping[str, Any]], Any]:
    """What finds a column in a record: by its name, else by the path that it spells.

    Where a path ends in a list, with `whole` that list is the value, and else nothing in it is.

    Raises
    ------
    ColumnMissing
        It has a dot or a bracket, and is no path.
    """
    if not ("." in name or "[" in name):
        return lambda record: record.get(name)
    path = _path(name)

    def find(record: Mapping[str, Any]) -> Any:
        if name in record:
            return record[name]
        if whole:
            return path.all(record)
        # The first that is no list and no object: whether it is text is for others to say.
        return next((v for v in path.all(record) if not isinstance(v, (dict, list))), None)

    return find


def root_of(name: str, present: Collection[str]) -> str:
    """The column of the source that a name, or the path that it spells, is in."""
    if name in present or not ("." in name or "[" in name):
        return name
    return _path(name).steps[0][0]


def _path(name: str) -> FieldPath:
    try:
        return FieldPath.parse(name)
    except ValueError as exc:
        raise ColumnMissing(str(exc)) from None
