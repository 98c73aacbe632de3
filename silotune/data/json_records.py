"""JSON: an object a line, or one array of objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from silotune.data.nested import finder, root_of
from silotune.data.shape import Shape, not_text, open_text
from silotune.data.table import Faults, Table, as_table, choose, empty_table
from silotune.data.values import Rule, of_float
from silotune.errors import DatasetUnreadable

_BLANK = " \t\r\n"

Record = dict[str, Any]
Found = Iterator[tuple[int, Record | None]]
"""Records with their numbers; None for what is no JSON object."""


def read_lines(path: Path, wanted: Collection[str] | None, shape: Shape) -> Table:
    """Some keys of JSON lines, or all when `wanted` is None; records are numbered by line.

    Raises
    ------
    DatasetUnreadable
        It is not of its encoding, or one JSON array.
    """
    return _read(path, wanted, shape, _lines)


def read_array(path: Path, wanted: Collection[str] | None, shape: Shape) -> Table:
    """Some keys of the objects of one JSON array, numbered from 1.

    Raises
    ------
    DatasetUnreadable
        It is not of its encoding, or no JSON array.
    """
    return _read(path, wanted, shape, _elements)


def decoder(rule: Rule) -> json.JSONDecoder:
    """Reads JSON whose numbers become text as `silotune.data.values` has it, also long ones."""
    if rule == 1:
        return json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
    constants = {"NaN": None, "Infinity": "inf", "-Infinity": "-inf"}
    return json.JSONDecoder(
        parse_int=str,
        parse_float=lambda digits: of_float(float(digits)),
        parse_constant=constants.__getitem__,
    )


def _read(
    path: Path,
    wanted: Collection[str] | None,
    shape: Shape,
    records_in: Callable[[Path, Shape, Faults], Found],
) -> Table:
    faults = Faults(str(path))
    numbers: list[int] = []
    broken: list[int] = []
    kept: list[Record] = []
    present: dict[str, None] = {}
    wanted = None if wanted is None else list(dict.fromkeys(wanted))
    finders = [finder(name, whole=name in shape.lists) for name in wanted or ()]
    columns: list[list[Any]] = [[] for _ in finders]
    try:
        for number, record in records_in(path, shape, faults):
            if record is None:
                broken.append(number)
                continue
            numbers.append(number)
            if wanted is None:
                kept.append(record)
            for column, find in zip(columns, finders, strict=True):
                column.append(find(record))
            if shape.strict or wanted is None:
                present.update(dict.fromkeys(record))
    except UnicodeDecodeError:
        raise not_text(path, shape) from None
    faults.add("not a JSON object", broken)
    if shape.strict:
        faults.check()
    if not numbers and not faults.found:
        return empty_table(path, wanted, strict=shape.strict)
    # Which keys there are depends on the records, so a site takes an absent one as empty.
    if shape.strict or wanted is None:
        choose(list(present), wanted and [root_of(name, present) for name in wanted], str(path))
    names = list(present) if wanted is None else wanted
    if wanted is None:
        columns = [[record.get(name) for record in kept] for name in names]
    values = dict(zip(names, columns, strict=True))
    return as_table(str(path), numbers, values, faults, shape.rule, lists=shape.lists)


def stream_json(path: Path, shape: Shape, *, array: bool) -> Iterator[tuple[int, Record]]:
    """The records one by one, with their numbers and with values as JSON has them.

    Raises
    ------
    DatasetUnreadable
        As `read_lines` or `read_array`; or something is no JSON object.
    """
    faults, read = Faults(str(path)), _elements if array else _lines
    try:
        for number, record in read(path, shape, faults, json.JSONDecoder()):
            if record is None:
                faults.add("not a JSON object", [number])
                break
            yield number, record
    except UnicodeDecodeError:
        raise not_text(path, shape) from None
    faults.check(DatasetUnreadable)


def _lines(
    path: Path, shape: Shape, faults: Faults, reader: json.JSONDecoder | None = None
) -> Found:
    decode, first = (reader or decoder(shape.rule)).decode, True
    with open_text(path, shape) as text:
        # The stream keeps line ends as they are: a text may hold U+2028, which is none here.
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            try:
                record = decode(line)
            except (ValueError, RecursionError):
                record = None
                if first and line.lstrip().startswith("["):
                    raise _one_array(path) from None
            if first and isinstance(record, list):
                raise _one_array(path)
            first = False
            yield number, record if isinstance(record, dict) else None


def _one_array(path: Path) -> DatasetUnreadable:
    return DatasetUnreadable(
        f"{path} is one JSON array, and the format jsonl is one JSON object a line",
        remedy='Say format = "json" for this dataset in site.toml.',
    )


def _elements(
    path: Path, shape: Shape, faults: Faults, reader: json.JSONDecoder | None = None
) -> Found:
    with open_text(path, shape) as stream:
        text = stream.read()
    scan, at, number = (reader or decoder(shape.rule)).raw_decode, _next(text, 0), 0
    if not text[at : at + 1]:
        return
    if text[at] != "[":
        raise DatasetUnreadable(
            f"{path} is no JSON array",
            remedy='One JSON object a line is format = "jsonl" in site.toml.',
        )
    at = _next(text, at + 1)
    while text[at : at + 1] != "]":
        number += 1
        try:
            record, at = scan(text, at)
        except (ValueError, RecursionError):
            at = -1
        else:
            yield number, record if isinstance(record, dict) else None
            at = _next(text, at)
            if text[at : at + 1] == ",":
                at = _next(text, at + 1)
            elif text[at : at + 1] != "]":
                at, number = -1, number + 1
        if at < 0:
            faults.add("not valid JSON, and nothing behind it was read, from", [number])
            return


def _next(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in _BLANK:
        at += 1
    return at
