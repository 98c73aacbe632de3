"""`silotune coordinator people`: certificates for those who look at the federation, or run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from silotune.commands.folder import HERE, AsJson, Folder, checked_name, client_of, moment
from silotune.terminal import terminal

app = typer.Typer(
    no_args_is_help=True,
    help="""Give people certificates for the admin API and the dashboard; take them back.

    A viewer may look at everything and change nothing; an operator may also propose, pause and stop
    runs, and let sites in or out.
    """,
)


@app.command()
def add(
    name: Annotated[
        str, typer.Argument(callback=checked_name, help="The person's name: a-z, 0-9, - and _.")
    ],
    role: Annotated[str, typer.Option(help="viewer or operator.")],
    out: Annotated[Path, typer.Option(help="Folder for the credentials; made if need be.")],
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Make a key and a certificate of 90 days; an earlier certificate of that name ends.

    The folder holds the private key: give it to the person over a safe way, and to nobody else.
    """
    from silotune.server.admin.client import AdminAddress, save_credentials
    from silotune.trust import identity

    if role not in {"viewer", "operator"}:
        raise typer.BadParameter("is viewer or operator", param_hint="--role")
    key = identity.new_node_key()
    request = identity.make_request(name, key)
    found = client_of(folder).post("/people", name=name, role=role, request=request)
    save_credentials(
        out,
        address=AdminAddress(address=found["address"], server_name=found["server_name"]),
        key=identity.private_pem(key),
        certificate=found["certificate"],
        authority=found["authority"],
    )
    if as_json:
        typer.echo(json.dumps({"name": name, "role": role, "credentials": str(out)}))
        return
    typer.echo(f"{name} is {'an' if role == 'operator' else 'a'} {role}; credentials are in {out}.")
    if found["address"]:
        typer.echo(f"Try: silotune admin --credentials {out} runs")
    else:
        typer.echo("The admin API is off: set port under [admin] in coordinator.toml and restart.")


@app.command("list")
def list_people(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """Show who has or had a certificate."""
    rows = client_of(folder).get("/people")
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table()
    for column in ("name", "role", "status", "since", "certificate"):
        table.add_column(column)
    for row in rows:
        since = moment(row["since"])
        table.add_row(*(row[k] for k in ("name", "role", "status")), since, row["certificate"][:16])
    terminal().print(table)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Whose certificate ends.")],
    folder: Folder = HERE,
) -> None:
    """Let a person's certificate count no more, from the next request on."""
    client_of(folder).post(f"/people/{name}/revoke")
    typer.echo(f"{name}'s certificate is revoked.")


@app.command()
def password(
    name: Annotated[
        str, typer.Argument(callback=checked_name, help="The person's name: a-z, 0-9, - and _.")
    ],
    role: Annotated[str, typer.Option(help="viewer or operator.")],
    folder: Folder = HERE,
) -> None:
    """Let a person sign in at the dashboard with a password, which is asked for twice.

    Only its scrypt hash is kept. From a pipe, the first line is the password.
    """
    import sys
    from typing import cast

    from silotune.dashboard.accounts import Accounts
    from silotune.server.config import Home
    from silotune.server.monitoring import ACCOUNTS_FILE
    from silotune.trust.identity import PersonRole

    if role not in {"viewer", "operator"}:
        raise typer.BadParameter("is viewer or operator", param_hint="--role")
    if sys.stdin.isatty():
        given = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    else:
        given = sys.stdin.readline().rstrip("\n")
    home = Home(folder)
    home.load()
    accounts = Accounts(home.state / ACCOUNTS_FILE)
    accounts.add(name, cast("PersonRole", role), given)
    typer.echo(f"{name} may sign in as {role}.")
