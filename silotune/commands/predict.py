"""`silotune predict`: use a run's final adapter."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.commands.reading import Form, read_texts
from silotune.errors import RunDirectoryInvalid

if TYPE_CHECKING:
    from silotune.models.base import LoadedModel
    from silotune.simulation.run_directory import RunDirectory


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
    from silotune.simulation.run_directory import RunDirectory

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
    from silotune.plan import Plan

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
