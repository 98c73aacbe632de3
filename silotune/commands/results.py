"""`silotune report`: write a run's report again.

`silotune dashboard`: simulations in a browser, in the very pages that show a federation.

`silotune export`: a run's curves for TensorBoard or MLflow.
"""

from __future__ import annotations

import json
from enum import StrEnum
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
    from silotune.report.report import summary, write_report

    if as_json:
        typer.echo(json.dumps(summary(run, beside=beside or [])))
        return
    typer.echo(write_report(run, beside=beside or []))


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

    from silotune.dashboard.page_guard import Door, serve_here
    from silotune.dashboard.pages import Content, build
    from silotune.events.source import RunDirectories

    source = RunDirectories(runs)

    def application(door: Door) -> ASGIApp:
        return build(Content(title=runs.resolve().name, source=source), door)

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
    from silotune.export import of_coordinator, of_directory

    if credentials is None:
        found = of_directory(Path(run))
    else:
        from silotune.server.admin.client import ControlClient

        client = ControlClient(credentials)
        try:
            found = of_coordinator(client, run)
        finally:
            client.close()
    if to is Tool.TENSORBOARD:
        from silotune.export import write_tensorboard

        shown = f"tensorboard --logdir {write_tensorboard(found, out).parent}"
    else:
        from silotune.export import write_mlflow

        shown = f"mlflow ui --backend-store-uri sqlite:///{write_mlflow(found, out).resolve()}"
    points = sum(map(len, found.curves.values()))
    typer.echo(f"Wrote {len(found.curves)} curves, {points} points. Look at them: {shown}")
