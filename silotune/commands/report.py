"""`silotune report`: write a run's report again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


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
    from silotune.simulation.report import write_report
    from silotune.simulation.summary import summary

    if as_json:
        typer.echo(json.dumps(summary(run, beside=beside or [])))
        return
    typer.echo(write_report(run, beside=beside or []))
