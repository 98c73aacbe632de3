"""`silotune coordinator runs statistics`: what a statistics run of the coordinator found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from silotune.commands.folder import HERE, AsJson, Folder, client_of
from silotune.terminal import terminal


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
    from silotune.trust.files import replace_file

    content = client_of(folder).download(run, "statistics.json")
    if out is not None:
        replace_file(out, content)
    if as_json:
        typer.echo(json.dumps(json.loads(content)))
        return
    print_statistics(json.loads(content), terminal())
