"""What commands share that run a federation: the coordinator's folder and daemon, printing, `reseal`.

`reseal`, of a coordinator and of a site, changes what opens the sealed files of a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic import TypeAdapter, ValidationError

from silotune.errors import EnvironmentFault, RunError
from silotune.plan.sections import Name
from silotune.terminal import say, show_rows
from silotune.trust.identity import PersonRole, account_of
from silotune.trust.vault import AtRest

if TYPE_CHECKING:
    from silotune.server.admin.socket_client import AdminClient
    from silotune.trust.audit import AuditLog
    from silotune.trust.vault import Vault


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
    from silotune.server.admin.socket_client import AdminClient
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


def checked_role(text: str) -> str:
    """The role of a person, or what it may be."""
    if text not in get_args(PersonRole):
        raise typer.BadParameter("is viewer or operator")
    return text


def moment(seconds: float) -> str:
    """A time in seconds since 1970, to the minute."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def tell(found: Any, text: str, *, as_json: bool) -> None:
    """Print what a command came to: as JSON, or in words."""
    typer.echo(json.dumps(found) if as_json else text)


def list_rows(
    found: Sequence[Any],
    shown: Iterable[Mapping[str, object]],
    columns: Sequence[str],
    *,
    as_json: bool,
    empty: str,
) -> None:
    """Print a list: as JSON, as a table of what is `shown`, or the sentence for an `empty` one."""
    if as_json or not found:
        tell(found, empty, as_json=as_json)
    else:
        show_rows(shown, columns)


def end_as(state: str) -> None:
    """End the command as its run did: with exit code 60 if that failed."""
    if state == "failed":
        raise typer.Exit(RunError.exit_code)


KeyFile = Annotated[
    Path | None, typer.Option(help="A key file; made if it isn't there. Best on another disk.")
]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        help="A file of mode 0600 whose first line is a passphrase of 12 characters or more; "
        "/dev/stdin reads it from a pipe."
    ),
]
PassphraseEnv = Annotated[
    str | None, typer.Option(help="Name of an environment variable that holds a passphrase.")
]


def at_rest_of(
    key_file: Path | None, passphrase_file: Path | None, passphrase_env: str | None
) -> AtRest:
    """``[at_rest]`` from the options of a command; empty if none is given."""
    given = {
        "key_file": None if key_file is None else str(key_file.absolute()),
        "passphrase_file": None if passphrase_file is None else str(passphrase_file.absolute()),
        "passphrase_env": passphrase_env,
    }
    if sum(value is not None for value in given.values()) > 1:
        raise typer.BadParameter("give one of --key-file, --passphrase-file and --passphrase-env")
    return AtRest(**given)


def reseal(
    vault: Vault, wanted: AtRest, *, audit: AuditLog, config: Path, base: Path, as_json: bool
) -> None:
    """Let `wanted` open the vault, note it in the audit log, and say what is left to do.

    Raises
    ------
    EnvironmentFault
        The folder belongs to another account, whose daemon could not read what this one writes.
    VaultLocked, FileExposed
        The new secret can't be used. Nothing was changed.
    """
    line = {name: value for name, value in wanted if value is not None}
    if not line:
        raise typer.BadParameter("give one of --key-file, --passphrase-file and --passphrase-env")
    if vault.folder.stat().st_uid != os.geteuid():
        raise EnvironmentFault(
            f"{vault.folder} belongs to the account {vault.folder.owner()}",
            remedy=f"Run the command as that account: sudo -u {vault.folder.owner()} silotune …",
        )
    before = vault.opened_by
    # Noted first: what opens the keys is never changed without a line about it.
    who = account_of(os.geteuid()).name
    audit.append("resealing", before=before, now=", ".join(line), who=who)
    kind = vault.reseal(wanted, base=base)
    _tell(config, before=before, kind=kind, line=line, as_json=as_json)


def _tell(config: Path, *, before: str, kind: str, line: dict[str, Any], as_json: bool) -> None:
    if as_json:
        found = {"config": str(config), "opened_by": kind, "before": before, "at_rest": line}
        typer.echo(json.dumps(found))
        return
    say(f"The new {kind} opens the sealed files. Now say so in {config}:")
    typer.echo("\n[at_rest]")
    for name, value in line.items():
        typer.echo(f"{name} = {json.dumps(value)}")
    if "passphrase_file" in line:
        typer.echo(
            '# as a systemd service: passphrase_file = "${CREDENTIALS_DIRECTORY}/passphrase"'
        )
    say(
        f"\nFrom the next start on the {before} of before opens nothing; until then both open them."
    )


def numbers_of_units(text: str, *, option: str) -> list[int]:
    """Units at each site, as an option has them: ``1000,2500``."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter("give whole numbers, e.g. 1000,2500", param_hint=option) from None
    if min(numbers) < 1:
        raise typer.BadParameter("a site has at least one unit", param_hint=option)
    return numbers
