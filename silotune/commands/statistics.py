"""`silotune coordinator runs statistics`: what a statistics run of the coordinator found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.commands.folder import HERE, AsJson, Folder, client_of
from silotune.terminal import terminal

if TYPE_CHECKING:
    from rich.console import Console


def statistics(
    run: Annotated[str, typer.Argument(help="The run's name, as `run` printed it.")],
    out: Annotated[
        Path | None, typer.Option(help="Also write statistics.json here, for `silotune plan new`.")
    ] = None,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show what a statistics run found: labels, lengths, sizes and numbers, with their intervals.

    Nothing that lies below the plan's floor is shown, or can be downloaded.
    """
    from silotune.report.statistics import print_statistics

    show_found(run, "statistics.json", print_statistics, out=out, folder=folder, as_json=as_json)


def show_found(
    run: str,
    name: str,
    show: Callable[[Mapping[str, Any], Console], None],
    *,
    out: Path | None,
    folder: Path,
    as_json: bool,
) -> None:
    """Fetch the file of what a run of sums found, write it where that is asked, and print it."""
    from silotune.trust.files import replace_file

    content = client_of(folder).download(run, name)
    if out is not None:
        replace_file(out, content)
    found = json.loads(content)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        show(found, terminal())
