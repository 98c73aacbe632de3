"""`silotune dashboard`: simulations in a browser, in the very pages that show a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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

    from silotune.dashboard.doorman import Door
    from silotune.dashboard.pages import Content, build
    from silotune.dashboard.serve import serve_here
    from silotune.events.source import RunDirectories

    source = RunDirectories(runs)

    def application(door: Door) -> ASGIApp:
        return build(Content(title=runs.resolve().name, source=source), door)

    serve_here(application, port=port, role="viewer", said=lambda url: typer.echo(f"Open {url}"))
