"""`silotune export`: a run's curves for TensorBoard or MLflow."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


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
    from silotune.export.curves import of_coordinator, of_directory

    if credentials is None:
        found = of_directory(Path(run))
    else:
        from silotune.server.control_client import ControlClient

        client = ControlClient(credentials)
        try:
            found = of_coordinator(client, run)
        finally:
            client.close()
    if to is Tool.TENSORBOARD:
        from silotune.export.tensorboard import write_tensorboard

        shown = f"tensorboard --logdir {write_tensorboard(found, out).parent}"
    else:
        from silotune.export.mlflow import write_mlflow

        shown = f"mlflow ui --backend-store-uri sqlite:///{write_mlflow(found, out).resolve()}"
    points = sum(map(len, found.curves.values()))
    typer.echo(f"Wrote {len(found.curves)} curves, {points} points. Look at them: {shown}")
