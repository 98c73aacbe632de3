"""What the commands of `silotune coordinator` share: its folder, the running daemon, moments."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from silotune.plan import Name

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


def checked_name(text: str) -> str:
    """A name as plans, certificates and logs take it, or the reason why not."""
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValidationError:
        raise typer.BadParameter(
            f"{text!r} is no name: lower-case letters, digits, '-' and '_', 63 at most"
        ) from None


def moment(seconds: float) -> str:
    """A time in seconds since 1970, to the minute."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
