"""`silotune predict`: a trained model's answers to texts and to files of records."""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.commands.asked import (
    Base,
    ColumnOption,
    Device,
    Images,
    Trained,
    counted,
    in_turn,
    named_columns,
    require_sees,
)
from silotune.errors import DatasetUnreadable
from silotune.percents import likelihood
from silotune.terminal import inert, say, terminal

if TYPE_CHECKING:
    from silotune.api.model import Model
    from silotune.inference.answers import Answered
    from silotune.inference.written import Answer

_DELIMITERS = ",;\t|"
_NONE = "\x1f"  # a delimiter that no text has: every line is one field


class Form(StrEnum):
    """How texts are written down."""

    AUTO = "auto"
    LINES = "lines"
    TEXT = "text"
    CSV = "csv"
    JSONL = "jsonl"


def predict(  # noqa: PLR0917 - one a command-line option
    run: Trained,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts to label, or prompts to answer; two in turn for a pair. '-', or "
            "nothing, reads them from standard "
            "input, one answer a record: see --format.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Answer a file of records instead: .csv, .jsonl, .parquet and others, perhaps packed; "
            "or all images below a folder."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --data: where the records go with their answers, as its name says: .csv, "
            ".jsonl or .parquet.",
            show_default="beside it, NAME.predictions.csv",
        ),
    ] = None,
    columns: ColumnOption = None,
    images: Images = None,
    prefix: Annotated[
        str, typer.Option(help="With --data: before the names of the added columns.")
    ] = "",
    temperature: Annotated[
        Path | None,
        typer.Option(help="temperature.json of `silotune evaluate`: calibrates probabilities."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --data: begin anew, whatever is there.")
    ] = False,
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="Of standard input: a text a line (in quotes it may span lines), all of it as one "
            "text, CSV with a header, or JSON lines. 'auto' looks at the first line.",
        ),
    ] = Form.AUTO,
    redact: Annotated[
        bool,
        typer.Option(
            "--redact",
            help="Of a run of token_classification: give the texts back with a mark such as [NAME] in "
            "place of what is found. Standard input that is no table is one text.",
        ),
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Of a run of token_classification: how likely it must be that a word is part of "
            "anything. Lower finds more, and more wrongly; .5 when absent.",
        ),
    ] = None,
    sample: Annotated[
        float,
        typer.Option(
            metavar="TEMPERATURE",
            min=0.0,
            help="Of a language model: 0 writes the likeliest answer; above, one by chance, from the "
            "model's own probabilities at 1.",
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=1e-6,
            max=1.0,
            help="With --sample: of the likeliest tokens, so much probability.",
        ),
    ] = 1.0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of a language model: no answer is longer; data.max_length if absent."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --sample: the same answer to the same text, whatever else is asked.",
        ),
    ] = None,
    base: Base = None,
    device: Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a text, or one for a file.")
    ] = False,
) -> None:
    """Apply the adapter of a run to new texts, or to a file of records.

    Prints one answer for each text, in the order given, and for an empty text that it is empty.

    With --data every record is written again, in its order and with all its columns, and behind them
    `prediction` and, where the task has labels, `probability_LABEL` (in JSON lines `probabilities`). It
    goes through the file block by block. A killed run goes on where it stopped when the command is given
    again; with another model, input or options it is refused. The output is for its owner only (0600).
    Paths of images are relative to the table's folder or to --images, and stay below it.

    With --redact the text itself is replaced, everything else of it stays as it is, and how much was
    found of each label is told at the end. A model misses some: have people look at what matters.
    """
    from silotune.api.model import load, plan_of

    plan = plan_of(run)
    facts, named = plan.task, plan.model.task
    for option in ["--redact"] * redact + ["--threshold"] * (threshold is not None):
        if not facts.each_token:
            raise typer.BadParameter(f"{named} finds nothing in a text", param_hint=option)
    settings = {"sample": sample, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    for key in (key for key, value in settings.items() if value != _GREEDY[key]):
        if not facts.generates:
            option = f"--{key.replace('_', '-')}"
            raise typer.BadParameter(f"{named} writes no text", param_hint=option)
    require_sees(plan, images)
    roles = named_columns(columns or [], facts.reads)

    def model() -> Model:
        from silotune.models.sampling import Sampling

        sampling = Sampling(
            temperature=sample, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
        )
        loaded = load(run, base=base, device=device)
        return loaded.answering(sampling=sampling, threshold=threshold, temperature=temperature)

    if data is not None:
        if texts:
            raise typer.BadParameter("give texts or --data")
        if redact:
            _require_one_column(roles)
        found = model().predict_file(
            data,
            out,
            columns=roles,
            images=images,
            prefix=prefix,
            redact=redact,
            force=force,
            progress=counted("answering"),
        )
        _tell(found, plan.model.labels if redact else None, as_json=as_json)
        return
    shown = _print_redacted if redact else _print
    if texts and texts != ["-"]:
        examples = in_turn(texts, list(roles))
        shown(model(), iter([examples]), len(examples), as_json)
        return
    plain = Form.TEXT if redact else Form.LINES
    with _standard_input(form, roles, plain=plain, images=images or Path()) as (blocks, several):
        shown(model(), blocks, several, as_json)


_GREEDY: Mapping[str, float | None] = {
    "sample": 0.0,
    "top_p": 1.0,
    "max_new_tokens": None,
    "seed": None,
}


def _require_one_column(roles: Mapping[str, str]) -> None:
    from silotune.data.columns import pieces_of

    if pieces_of(next(iter(roles.values()))) is not None:
        raise typer.BadParameter("--redact replaces one column", param_hint="--column")


def _tell(found: Answered, redacted: Sequence[str] | None, *, as_json: bool) -> None:
    """What was written; of redacted texts, how much was found of each label."""
    if as_json:
        shown = {
            "out": str(found.out),
            "records": found.records,
            "empty": found.empty,
            "answered_before": found.before,
            **({} if redacted is None else {"found": dict(found.found)}),
        }
        typer.echo(json.dumps(shown))
        return
    empty = f", {found.empty} of which are empty and have no answer" if found.empty else ""
    before = f"; {found.before:,} were answered before" if found.before else ""
    say(f"Wrote {found.out}: {found.records:,} records{empty}{before}.")
    if redacted is not None:
        _tell_found(found.found, redacted)


def _tell_found(found: Mapping[str, int], labels: Sequence[str]) -> None:
    from silotune.inference.redaction import in_words

    terminal(stderr=True).print(f"Found {in_words(found, labels)}.", soft_wrap=True)


# --- texts of the command line and of standard input ---

Examples = Sequence[Mapping[str, str]]


@contextmanager
def _standard_input(
    form: Form, roles: Mapping[str, str], *, plain: Form, images: Path
) -> Iterator[tuple[Iterator[Examples], int]]:
    """The records of standard input by role, some at a time, and how many; `plain` if no table."""
    from silotune.inference.records import Given, examples_of

    content = sys.stdin.buffer.read()
    first = next(iter(roles))
    form = _form_of(content, roles[first], plain=plain) if form is Form.AUTO else form
    if form is Form.TEXT:
        try:
            yield iter([[{first: content.decode()}]]), 1
        except UnicodeDecodeError as exc:
            raise DatasetUnreadable(f"standard input is not UTF-8: {exc.reason}") from exc
        return
    if form is Form.LINES and len(roles) > 1:
        raise typer.BadParameter(
            f"the model reads {' and '.join(roles)}: give CSV with a header, or JSON lines"
        )
    if form is Form.LINES:
        found = [{first: text} for text in _of_lines(content)]
        yield iter([found]), len(found)
        return
    # The readers of files take a file, and are the ones that training had.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"standard-input.{form}"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(content)
        given = Given(path=path, roles=roles, images=images)
        records = given.outline().records if content.strip() else 0
        blocks = (examples_of(table) for _, table in given.blocks()) if records else iter([])
        yield blocks, records


def _form_of(content: bytes, column: str, *, plain: Form) -> Form:
    start = content.decode("utf-8-sig", "replace").lstrip()
    if start.startswith("{"):
        return Form.JSONL
    first = start.split("\n", 1)[0].rstrip("\r")
    fields = (next(csv.reader([first], delimiter=sign), []) for sign in _DELIMITERS)
    return Form.CSV if any(column in names for names in fields) else plain


def _of_lines(content: bytes) -> list[str]:
    """A text a line, or a quoted one over several; quotes that don't close are part of the text."""
    try:
        body = content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as exc:
        raise DatasetUnreadable(f"standard input is not UTF-8: {exc.reason}") from exc
    if not body:
        return []
    try:
        rows = list(csv.reader(body.splitlines(keepends=True), delimiter=_NONE, strict=True))
    except csv.Error:
        return body.split("\n")
    return [row[0] if row else "" for row in rows]


def _print(model: Model, blocks: Iterator[Examples], several: int, as_json: bool) -> None:
    """Print the answers, one a record."""
    facts, number = model.plan.task, 0
    for examples in blocks:
        for example, answer in zip(examples, model.answers(examples), strict=True):
            number += 1
            text = " ".join(example.values())
            if as_json:
                given = example if len(example) > 1 else {"text": text}
                typer.echo(json.dumps({**given, "prediction": _as_json(answer)}))
                continue
            shown = _shown(answer, text)
            if facts.generates and several > 1:
                shown = f"{'' if number == 1 else chr(10)}[{number}] {_one_line(text)}\n{shown}"
            # A model may write what a terminal obeys; anything else gets it as it is.
            typer.echo(inert(shown) if sys.stdout.isatty() else shown)


def _print_redacted(model: Model, blocks: Iterator[Examples], several: int, as_json: bool) -> None:
    """Print texts without what was found in them; one text alone byte for byte."""
    from silotune.inference.redaction import moved, redacted

    found: Counter[str] = Counter()
    for examples in blocks:
        for example, answer in zip(examples, model.answers(examples), strict=True):
            (text,) = example.values()
            spans = [moved(span, 0) for span in answer["prediction"]] if answer else []
            own = Counter(span.label for span in spans)
            found += own
            shown = redacted(text, spans)
            if as_json:
                typer.echo(json.dumps({"redacted": shown, "found": own}))
            else:
                typer.echo(shown, nl=several > 1 or not shown.endswith("\n"))
    _tell_found(found, model.plan.model.labels)


def _as_json(answer: Answer | None) -> Any:
    """What is answered alone, or a label with its probabilities."""
    if answer is None or "probabilities" not in answer:
        return answer and answer["prediction"]
    key = "label" if isinstance(answer["prediction"], str) else "labels"
    return {key: answer["prediction"], "probabilities": answer["probabilities"]}


def _shown(answer: Answer | None, text: str) -> str:
    if answer is None:
        return "(an empty text)"
    found, shares = answer["prediction"], answer.get("probabilities")
    if isinstance(found, str) and shares:
        return f"{found}  {likelihood(shares[found])}  {_one_line(text)}"
    if shares:
        each = (f"{label} {likelihood(shares[label])}" for label in found)
        return f"{', '.join(each) or '(none)'}  {_one_line(text)}"
    if isinstance(found, float):
        return f"{found:.6g}  {_one_line(text)}"
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split("\n"))
