"""`silotune predict`: use a run's final adapter."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from silotune.errors import RunDirectoryInvalid


def predict(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; '-' reads one a line from standard input.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a text.")] = False,
) -> None:
    """Apply the final adapter of a run to new texts."""
    given = texts or ["-"]
    if given == ["-"]:
        given = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for text, found in zip(given, _predicted(run, given, device), strict=True):
        value = asdict(found) if is_dataclass(found) and not isinstance(found, type) else found
        if as_json:
            typer.echo(json.dumps({"text": text, "prediction": value}))
        else:
            typer.echo(_line(value, text))


def _predicted(run: Path, texts: list[str], device: str) -> list[Any]:
    from silotune.models.adapter import load_adapter, write_adapter
    from silotune.models.base import load_model
    from silotune.plan import Plan
    from silotune.simulation.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    if not directory.final_adapter.is_dir():
        raise RunDirectoryInvalid(
            f"{run} has no final adapter yet",
            remedy=f"Finish the run first: silotune simulate --resume {run}",
        )
    plan = Plan.from_canonical(json.dumps(directory.read_json("resolved.json")["plan"]))
    model = load_model(plan, device=device)
    write_adapter(model, load_adapter(model, directory.final_adapter))
    return list(model.task.predict(model, texts))


def _line(value: Any, text: str) -> str:
    if isinstance(value, dict):
        share = value["probabilities"][value["label"]]
        return f"{value['label']}  {share:.0%}  {text}"
    return str(value)
