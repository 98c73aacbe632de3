"""What the commands of `silotune coordinator` share: its folder, the running daemon, moments."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from silotune.server.admin_client import AdminClient

Folder = Annotated[
    Path,
    typer.Option(
        "--dir", envvar="SILOTUNE_COORDINATOR", help="The coordinator's folder.", show_default="."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HERE = Path()


def client_of(folder: Path) -> AdminClient:
    """The way to the daemon that runs in a folder."""
    from silotune.server.admin_client import AdminClient
    from silotune.server.config import Home

    return AdminClient(Home(folder))


def moment(seconds: float) -> str:
    """A time in seconds since 1970, to the minute."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
