"""`silotune explain`: which tokens of a text speak for an answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from silotune.commands.asked import (
    Base,
    ColumnOption,
    Device,
    Trained,
    counted,
    in_turn,
    named_columns,
)
from silotune.commands.folder import AsJson
from silotune.percents import likelihood
from silotune.terminal import say, terminal

if TYPE_CHECKING:
    from silotune.inference.explanation import Explanation

_STRONG, _WEAK = 0.5, 0.15  # of the largest part
_MOST_ROWS = 1000


def explain(  # noqa: PLR0917 - one a command-line option
    run: Trained,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to explain the labels of; two in turn for a pair."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Instead of texts: records of a file, .csv, .jsonl, .parquet and others."
        ),
    ] = None,
    columns: ColumnOption = None,
    rows: Annotated[
        str,
        typer.Option(
            help="Which of them, as a spreadsheet numbers rows: 2-5,9. The first ten when absent."
        ),
    ] = "",
    label: Annotated[
        str, typer.Option(help="The label to explain; the likeliest when absent.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Write a page with all of them, mode 0600, such as page.html."),
    ] = None,
    base: Base = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which tokens of a text speak for a label, and which against it; on this machine only.

    Integrated gradients: what all tokens add is the label's logit less that of a text of padding, which
    is checked and told. In a terminal, tokens that speak for the label are green and underlined, those
    against it red; the strongest are bold. It shows what the model looks at, and not what is so. Needs
    `pip install 'silotune[explain]'`.

    For one label or several of a text or a pair of texts. It shows records: for this site's own people.
    """
    from silotune.api.explaining import explain as explained
    from silotune.api.explaining import given_records
    from silotune.api.model import plan_of

    if bool(texts) == (data is not None) or (rows and data is None):
        raise typer.BadParameter("give texts, or --data with --rows")
    plan = plan_of(run)
    roles = named_columns(columns or [], plan.task.reads or ("text",))
    if data is None:
        asked = [("", example) for example in in_turn(texts or [], list(roles))]
    else:
        numbered = given_records(data, roles, rows=_numbers(rows))
        asked = [(f"row {row}", example) for row, example in numbered]
    with counted("explaining") as (started, advance):
        started(len(asked), 0)
        found = []
        examples = (example for _, example in asked)
        for one in explained(run, examples, label=label, base=base, device=device):
            found.append(one)
            advance(1)
    if out is not None:
        names = [name or f"text {number}" for number, (name, _) in enumerate(asked, start=1)]
        _write(out, names, found, plan.plan.name)
    for (name, example), one in zip(asked, found, strict=True):
        if as_json:
            texts_of = {"text": example["text"]} if len(example) == 1 else dict(example)
            row = {"row": int(name.removeprefix("row "))} if name else {}
            typer.echo(json.dumps({**row, **texts_of, **asdict(one)}))
        elif out is None:
            _print(one, name)
    if out is not None and not as_json:
        say(f"The page is {out}; it shows records, and is for this site's own people.")


def _numbers(rows: str) -> list[int]:
    """``2-5,9`` as numbers, each once."""
    found: dict[int, None] = {}
    for part in filter(None, rows.replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter("rows are such as 2-5,9", param_hint="--rows")
        start, end = int(first), int(last or first)
        if end < start:
            raise typer.BadParameter(f"{part} has no row in it", param_hint="--rows")
        if end - start >= _MOST_ROWS:
            raise typer.BadParameter(f"at most {_MOST_ROWS} rows at once", param_hint="--rows")
        found |= dict.fromkeys(range(start, end + 1))
    return list(found)


def _write(out: Path, names: list[str], found: list[Explanation], plan: str) -> None:
    from silotune.report.explanation_page import ExplainedRecord, render_explanations
    from silotune.trust.files import replace_file

    records = [
        ExplainedRecord(name=name, found=one) for name, one in zip(names, found, strict=True)
    ]
    replace_file(out, render_explanations(records, plan=plan).encode())


def _print(found: Explanation, name: str) -> None:
    console = terminal()
    head = f"{name}: " if name else ""
    console.print(Text(f"{head}{found.label}  {likelihood(found.probability)}", style="bold"))
    most = max((abs(part) for _, part in found.tokens), default=0.0) or 1.0
    words = [Text(word, style=_style(part / most)) for word, part in found.tokens]
    console.print(Text(" ").join(words))
    strongest = sorted(found.tokens, key=lambda token: -abs(token[1]))[:8]
    for word, part in strongest:
        console.print(f"  {part:+.3f}  {word}")
    holds = "as it should be" if found.complete else "which is NOT close: don't rely on it"
    console.print(
        f"All tokens add {found.total:+.3f} to the logit; it differs by {found.difference:+.3f} from "
        f"that of padding ({found.steps} steps), {holds}.",
        style="dim" if found.complete else "bold red",
    )


def _style(part: float) -> str:
    """How a token is shown, by its part of the strongest one's."""
    if abs(part) < _WEAK:
        return ""
    bold = "bold " if abs(part) >= _STRONG else ""
    return f"{bold}green underline" if part > 0 else f"{bold}red"
