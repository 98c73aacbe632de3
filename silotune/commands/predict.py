"""`silotune predict`: use a run's final adapter.

Texts from standard input: lines, CSV or JSON lines, one record each.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import asdict, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.errors import ColumnMissing, DatasetUnreadable, RunDirectoryInvalid

if TYPE_CHECKING:
    from silotune.models.task import LoadedModel
    from silotune.rounds.run_directory import RunDirectory


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


def predict(  # noqa: PLR0917 - one a command-line option
    run: Annotated[
        Path, typer.Argument(help="A finished run's directory, in runs/.", show_default=False)
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts to label, or prompts to answer. '-', or nothing, reads them from standard "
            "input, one answer a record: see --format.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="Of standard input: a text a line (in quotes it may span lines), CSV with a header, "
            "or JSON lines. 'auto' looks at the first line.",
        ),
    ] = Form.AUTO,
    column: Annotated[
        str, typer.Option(help="Column or key of the text, if not 'text' (or 'prompt').")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a text.")] = False,
) -> None:
    """Apply the final adapter of a run to new texts.

    Prints one answer for each text, in the order given, and for an empty text that it is empty.
    """
    directory = _finished(run)
    plan = directory.read_json("resolved.json")["plan"]
    generative = plan["model"]["task"] == "causal_lm"
    given = texts or ["-"]
    if given == ["-"]:
        role = column or ("prompt" if generative else "text")
        given = read_texts(sys.stdin.buffer.read(), form=form, column=role)
    model = _loaded(directory, device)
    wanted = [text for text in given if text.strip()]
    found = iter(model.task.predict(model, wanted) if wanted else [])
    for number, text in enumerate(given, start=1):
        answer = next(found) if text.strip() else None
        value = asdict(answer) if is_dataclass(answer) and not isinstance(answer, type) else answer
        if as_json:
            typer.echo(json.dumps({"text": text, "prediction": value}))
        elif generative and len(given) > 1:
            typer.echo(f"{'' if number == 1 else chr(10)}[{number}] {_one_line(text)}")
            typer.echo(_shown(value, text))
        else:
            typer.echo(_shown(value, text))


def _finished(run: Path) -> RunDirectory:
    from silotune.rounds.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    if not directory.final_adapter.is_dir():
        raise RunDirectoryInvalid(
            f"{run} has no final adapter yet",
            remedy=f"Finish the run first: silotune simulate --resume {run}",
        )
    return directory


def _loaded(directory: RunDirectory, device: str) -> LoadedModel:
    """The run's model with its final adapter, computing as the run did."""
    from silotune.models.adapter import load_adapter, write_adapter
    from silotune.models.base import load_model
    from silotune.plan.plan import Plan

    facts = directory.read_json("resolved.json")
    plan, choices = Plan.from_canonical(json.dumps(facts["plan"])), facts["choices"]
    model = load_model(
        plan, device=device, attention=choices["attention"], dtype=choices["dtype"], trial=False
    )
    write_adapter(model, load_adapter(model, directory.final_adapter))
    return model


def _shown(value: Any, text: str) -> str:
    if value is None:
        return "(an empty text)"
    if isinstance(value, dict):
        share = value["probabilities"][value["label"]]
        return f"{value['label']}  {share:.0%}  {_one_line(text)}"
    return str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split("\n"))
