"""What is done with a run: `silotune report`, `dashboard`, `export`, `predict` and `release`."""

from __future__ import annotations

import csv
import io
import json
import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from silotune.commands.folder import AsJson
from silotune.errors import ColumnMissing, DatasetUnreadable
from silotune.terminal import say, terminal
from silotune.version import __version__

if TYPE_CHECKING:
    from silotune.models.prediction import Prediction
    from silotune.release import Examined
    from silotune.rounds.run_directory import RunDirectory


def report(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Another run of the same plan, for the scores' spread; repeatable."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the run's figures as one JSON object instead.")
    ] = False,
) -> None:
    """Write report.html and its pictures into a run directory, also while the run goes on."""
    from silotune.api.run import Run

    found, others = Run(run), [Run(other) for other in beside or []]
    typer.echo(json.dumps(found.to_json(beside=others)) if as_json else found.report(beside=others))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two run directories or more.")],
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: the plan settings in which they differ, and what came of them.

    Scores are of the federated model on held-out test data; epsilon is the largest that a site spent.
    """
    from silotune.api.comparison import compare as side_by_side

    found = side_by_side(*runs)
    if as_json:
        shown = {"score": found.score, "settings": found.settings, "runs": found.rows}
        typer.echo(json.dumps(shown))
        return
    differing = {key: list(map(_cell, values)) for key, values in found.settings.items()}
    columns = dict.fromkeys(key for row in found.rows for key in row)
    results = {key: [_cell(row.get(key)) for row in found.rows] for key in columns}
    # A run a column: plans may differ in many keys, and the runs are few.
    table = Table("", *(str(row["run"]) for row in found.rows), box=None)
    for key, cells in ({**differing, **results}).items():
        if key != "run":
            table.add_row(key, *cells)
    terminal().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def dashboard(
    runs: Annotated[
        Path, typer.Argument(help="A run directory, or a folder that holds several.")
    ] = Path("runs"),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")
    ] = 0,
) -> None:
    """Show simulations in a browser, also while they go on.

    Serves this machine alone (127.0.0.1) until Ctrl-C, and lets in only who has the printed link.
    """
    from starlette.types import ASGIApp

    from silotune.dashboard.page_guard import Access, serve_here
    from silotune.dashboard.pages import Content, build
    from silotune.events.source import RunDirectories

    source = RunDirectories(runs)

    def application(access: Access) -> ASGIApp:
        return build(Content(title=runs.resolve().name, source=source), access)

    serve_here(application, port=port, role="viewer", said=lambda url: typer.echo(f"Open {url}"))


class Tool(StrEnum):
    """Where the curves go."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"


def export(
    run: Annotated[
        str, typer.Argument(help="A run directory; with --credentials, a run of the coordinator.")
    ],
    to: Annotated[Tool, typer.Option(help="The tool that will read them.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    credentials: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the credentials of a person at the coordinator (`silotune admin`)."
        ),
    ] = None,
) -> None:
    """Write a run's curves for another tool: released metrics, epsilon, seconds, bytes.

    Needs `pip install 'silotune[tensorboard]'` or `'silotune[mlflow]'`.
    """
    from silotune import export as curves

    if credentials is None:
        found = curves.of_directory(Path(run))
    else:
        from silotune.server.admin.client import ControlClient

        client = ControlClient(credentials)
        try:
            found = curves.of_coordinator(client, run)
        finally:
            client.close()
    if to is Tool.TENSORBOARD:
        shown = f"tensorboard --logdir {curves.write_tensorboard(found, out).parent}"
    else:
        store = curves.write_mlflow(found, out).resolve()
        shown = f"mlflow ui --backend-store-uri sqlite:///{store}"
    points = sum(map(len, found.curves.values()))
    typer.echo(f"Wrote {len(found.curves)} curves, {points} points. Look at them: {shown}")


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
            lines = enumerate(text.split("\n"), start=1)
            return [_of_object(n, line, column) for n, line in lines if line.strip()]
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
        Path,
        typer.Argument(help="A finished run's directory, or an adapter's.", show_default=False),
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
    base: Annotated[
        str | None,
        typer.Option(help="Where the base model is here, if not where the plan says."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a text.")] = False,
) -> None:
    """Apply a trained adapter to new texts.

    Prints one answer for each text, in the order given, and for an empty text that it is empty.
    """
    from silotune.rounds.trained import find_trained

    trained = find_trained(run)
    task = trained.plan.task
    given, role = texts or ["-"], task.reads[0]
    if given == ["-"]:
        given = read_texts(sys.stdin.buffer.read(), form=form, column=column or role)
    model = trained.load(base=base, device=device)
    wanted = [{role: text} for text in given if text.strip()]
    found = iter(model.task.predict(model, wanted) if wanted else [])
    for number, text in enumerate(given, start=1):
        answer = next(found) if text.strip() else None
        value = None if answer is None else _as_json(answer)
        if as_json:
            typer.echo(json.dumps({"text": text, "prediction": value}))
        elif task.generates and len(given) > 1:
            typer.echo(f"{'' if number == 1 else chr(10)}[{number}] {_one_line(text)}")
            typer.echo(_shown(value, text))
        else:
            typer.echo(_shown(value, text))


def _as_json(answer: Prediction) -> Any:
    """A text alone, or a label with its probabilities."""
    if not answer.probabilities:
        return answer.output
    return {"label": answer.output, "probabilities": dict(answer.probabilities)}


def _shown(value: Any, text: str) -> str:
    if value is None:
        return "(an empty text)"
    if isinstance(value, dict):
        share = value["probabilities"][value["label"]]
        return f"{value['label']}  {share:.0%}  {_one_line(text)}"
    return str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split("\n"))


def release(  # noqa: PLR0917 - one a command-line option
    run: Annotated[Path, typer.Argument(help="Run directory of a finished run.")],
    person: Annotated[
        str | None, typer.Option("--by", metavar="NAME", help="Who signs: a person's full name.")
    ] = None,
    role: Annotated[
        str | None, typer.Option(help="In which role, e.g. 'output checker'. Needed with --by.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="That person's key file; made (mode 0600) if it isn't there."),
    ] = None,
    most_exposure: Annotated[
        float, typer.Option(min=0.0, help="Bits of exposure that a canary may have (causal_lm).")
    ] = 10.0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the signed release instead of making one.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a finished run's adapter against every control, and have a named person sign.

    Without --by nothing is signed: the table says what passes, who holds each control, and which numbers
    were compared. Exit 40 if one is not passed; none can be waived. docs/release.md explains them.
    """
    from silotune.errors import ReleaseRefused
    from silotune.release import examine
    from silotune.rounds.run_directory import RunDirectory

    _require_whole(person, role, key, verify=verify)
    directory = RunDirectory.open(run)
    if verify:
        _verify(directory, as_json=as_json)
        return
    found = examine(directory, most_exposure=most_exposure)
    signed = None
    if person and role and key and not found.failed:
        signed = _sign(directory, found, person=person, role=role, key=key)
    _show(found, signed, as_json=as_json)
    if found.failed:
        raise ReleaseRefused(f"not passed: {', '.join(found.failed)}")


def _require_whole(person: str | None, role: str | None, key: Path | None, *, verify: bool) -> None:
    given = [value is not None for value in (person, role, key)]
    if verify and any(given):
        raise typer.BadParameter("--verify signs nothing; leave --by, --role and --key out")
    if any(given) and not all(given):
        raise typer.BadParameter("signing takes --by, --role and --key, all three")


def _sign(
    directory: RunDirectory, found: Examined, *, person: str, role: str, key: Path
) -> tuple[Path, str]:
    from silotune.release import RELEASE_FILE, ReleaseControl, Statement, sign
    from silotune.trust.identity import fingerprint, load_or_create

    private = load_or_create(key)
    statement = Statement(
        run=found.run,
        plan_sha256=found.plan_sha256,
        files=dict(found.files),
        certificates=dict(found.certificates),
        controls=(*found.controls, ReleaseControl(name="signature", held_by="person", passed=True)),
        person=person,
        role=role,
        code_version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    path = directory.root / RELEASE_FILE
    sign(statement, path, key=private)
    return path, fingerprint(private.public_key())


def _show(found: Examined, signed: tuple[Path, str] | None, *, as_json: bool) -> None:
    from silotune import release as words

    if as_json:
        shown = {
            "run": found.run,
            "passed": not found.failed,
            "controls": [control.model_dump() for control in found.controls],
            "signed": str(signed[0]) if signed else None,
            "key_sha256": signed[1] if signed else None,
        }
        typer.echo(json.dumps(shown))
        return
    table = Table("control", "held by", "asks", "found", "")
    for control in found.controls:
        style = {True: "green", False: "bold red", None: "dim"}[control.passed]
        table.add_row(
            control.name,
            words.holder(control),
            words.asks(control),
            words.figures(control),
            Text(words.verdict(control), style=style),
        )
    terminal().print(table)
    if signed:
        say(f"Signed: {signed[0]}. The key's fingerprint, for others to compare: {signed[1]}")
    elif not found.failed:
        say("Every control is passed. To sign: --by NAME --role ROLE --key FILE")


def _verify(directory: RunDirectory, *, as_json: bool) -> None:
    """Whether the adapter and the certificates here are those that were signed."""
    from silotune.errors import ReleaseInvalid
    from silotune.release import RELEASE_FILE, examine, read

    statement, signer = read(directory.root / RELEASE_FILE)
    now = examine(directory)
    signed = (statement.files, statement.certificates, statement.plan_sha256)
    if signed != (now.files, now.certificates, now.plan_sha256):
        changed = [
            name
            for name in sorted({*statement.files, *now.files})
            if statement.files.get(name) != now.files.get(name)
        ]
        raise ReleaseInvalid(
            f"changed since it was signed: {', '.join(changed) or 'a certificate or the plan'}"
        )
    if as_json:
        typer.echo(json.dumps({"valid": True, "key_sha256": signer, **statement.model_dump()}))
        return
    say(
        f"Valid: signed by {statement.person} ({statement.role}) on {statement.time}. "
        f"Compare the key's fingerprint: {signer}"
    )
