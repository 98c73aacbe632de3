"""Texts from standard input: lines, CSV or JSON lines, one record each."""

from __future__ import annotations

import csv
import io
import json
from enum import StrEnum

from silotune.errors import ColumnMissing, DatasetUnreadable

_DELIMITERS = ",;\t|"
_NONE = "\x1f"  # a delimiter that no text has: every line is one field


class Form(StrEnum):
    """How texts are written down."""

    AUTO = "auto"
    LINES = "lines"
    CSV = "csv"
    JSONL = "jsonl"


def read_texts(content: bytes, *, form: Form, column: str) -> list[str]:
    """The texts of some input, one a record; an empty record is an empty text.

    Parameters
    ----------
    content : bytes
        UTF-8, perhaps with a byte order mark; lines may end as on Windows.
    form : Form
        With `AUTO`, input that begins with ``{`` is JSON lines, input whose first record names
        `column` is CSV, and anything else has a text a line, which may be quoted as in CSV.
    column : str
        Where a CSV file or a JSON object has the text.

    Raises
    ------
    DatasetUnreadable
        Not UTF-8, or not of the form.
    ColumnMissing
        No such column.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DatasetUnreadable(f"standard input is not UTF-8: {exc.reason}") from exc
    text = text.replace("\r\n", "\n")
    if form is Form.AUTO:
        form = _form_of(text, column)
    match form:
        case Form.JSONL:
            return [_of_object(n, line, column) for n, line in _numbered(text) if line.strip()]
        case Form.CSV:
            return _of_table(text, column)
        case _:
            return _of_lines(text)


def _form_of(text: str, column: str) -> Form:
    if text.lstrip().startswith("{"):
        return Form.JSONL
    return Form.CSV if _delimiter(text, column) else Form.LINES


def _delimiter(text: str, column: str) -> str:
    """What parts the first record so that one of its fields is the column's name; empty if nothing."""
    first = text.split("\n", 1)[0]
    return next(
        (d for d in _DELIMITERS if column in next(csv.reader([first], delimiter=d), [])), ""
    )


def _numbered(text: str) -> list[tuple[int, str]]:
    return list(enumerate(text.split("\n"), start=1))


def _of_object(number: int, line: str, column: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as exc:
        raise DatasetUnreadable(f"standard input, line {number} is not a JSON object") from exc
    value = found.get(column) if isinstance(found, dict) else found
    if not isinstance(value, str):
        raise ColumnMissing(
            f"standard input, line {number} has no text under {column!r}",
            remedy="Name the key with --column.",
        )
    return value


def _of_table(text: str, column: str) -> list[str]:
    delimiter = _delimiter(text, column)
    if not delimiter:
        raise ColumnMissing(
            f"the first line of standard input names no column {column!r}",
            remedy="Name the column with --column, or say --format lines.",
        )
    try:
        table = csv.DictReader(io.StringIO(text), delimiter=delimiter)
        return [row[column] or "" for row in table]
    except csv.Error as exc:
        raise DatasetUnreadable(f"standard input is not a CSV file: {exc}") from exc


def _of_lines(text: str) -> list[str]:
    """A text a line, or a quoted one over several; quotes that don't close are part of the text."""
    body = text.removesuffix("\n")
    if not body:
        return []
    try:
        rows = list(csv.reader(io.StringIO(body), delimiter=_NONE, strict=True))
    except csv.Error:
        return body.split("\n")
    return [row[0] if row else "" for row in rows]
