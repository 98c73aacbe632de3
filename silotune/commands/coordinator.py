"""`silotune coordinator`: make a federation, run its coordinator, let sites in."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from silotune.commands import coordinator_people, coordinator_runs
from silotune.commands import folder as sealing
from silotune.commands import site as site_views
from silotune.commands.folder import HERE, AsJson, Folder, checked_name, client_of, moment
from silotune.terminal import say, show_rows

app = typer.Typer(
    no_args_is_help=True,
    help="""Run the coordinator of a federation.

    One folder holds everything of it: every command finds it by --dir or SILOTUNE_COORDINATOR, or
    takes the one you are in. A federation begins with `init`, then `start` runs the daemon, and
    `doctor` says what is wrong; the other commands talk to the running daemon through a socket in the
    folder, so they are run on the same machine and by the same account.

    A site comes in by three steps: `invite SITE` prints a code for its team; their `silotune site
    join CODE` sends a request, which `requests` shows; you compare the six words by telephone, and
    `approve`. Then `run plan.toml` proposes a plan to all sites.
    """,
    epilog="Start with: silotune coordinator init --dir federation --name demo --host coord.example.org",
)
sites = typer.Typer(
    no_args_is_help=True, help="Look at the sites, shut one out, or renew its keys."
)
app.add_typer(sites, name="sites")


coordinator_runs.register(app)
app.add_typer(coordinator_people.app, name="people")


@app.command()
def init(  # noqa: PLR0917 - one a command-line option
    name: Annotated[
        str,
        typer.Option(callback=checked_name, help="The federation's name: a-z, 0-9, - and _."),
    ],
    host: Annotated[
        list[str],
        typer.Option(
            help="Name or IP address under which sites reach this machine; may be given repeatedly."
        ),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="The one public port.")] = 8443,
    listen: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",  # noqa: S104
    key_file: sealing.KeyFile = None,
    passphrase_file: sealing.PassphraseFile = None,
    passphrase_env: sealing.PassphraseEnv = None,
    folder: Annotated[
        Path,
        typer.Option(
            "--dir",
            envvar="SILOTUNE_COORDINATOR",
            help="The coordinator's folder: empty, or made here.",
            show_default=".",
        ),
    ] = HERE,
    as_json: AsJson = False,
) -> None:
    """Make a federation: its authority, its keys, its configuration.

    The authority's private key never leaves the folder. It is sealed; what opens it is a key file
    (by default one in the folder itself) or a passphrase, and `reseal` changes that. Back the folder
    up, and the key file or passphrase apart from it: whoever loses them has to enrol every site anew;
    whoever has both is the federation.
    """
    from silotune.server.config import Home
    from silotune.server.coordinator import create

    wanted = sealing.at_rest_of(key_file, passphrase_file, passphrase_env)
    at_rest = "".join(f"{key} = {json.dumps(value)}" for key, value in wanted if value is not None)
    config, keys = create(
        Home(folder), name=name, hosts=host, listen=listen, port=port, at_rest=at_rest
    )
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "folder": str(folder.resolve()),
                    "federation": config.federation.name,
                    "authority_sha256": keys.fingerprint,
                }
            )
        )
        return
    typer.echo(f"Federation {name} is in {folder}. Its authority has the SHA-256 fingerprint")
    typer.echo(f"  {keys.fingerprint}")
    typer.echo(
        f"Look at {folder / 'coordinator.toml'}, then: silotune coordinator start --dir {folder}"
    )


@app.command()
def start(folder: Folder = HERE) -> None:
    """Run the coordinator until it gets SIGTERM or Ctrl-C.

    Runs that were under way go on from their last finished round. Sites reconnect by themselves.
    """
    import os

    os.umask(0o077)
    from silotune import logs
    from silotune.events import tracing
    from silotune.server.config import Home
    from silotune.server.coordinator import Coordinator

    home = Home(folder)
    config = home.load()
    logs.configure(style=config.logging.format, level=config.logging.level)
    tracing.configure("silotune-coordinator")
    coordinator = Coordinator(home)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: coordinator.stop())
    coordinator.start()
    typer.echo(f"Listening at {coordinator.url}", err=True)
    try:
        coordinator.wait()
    finally:
        coordinator.close()
        tracing.stop()


@app.command()
def doctor(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """Check everything the coordinator needs, running or not; exit 70 if something is wrong.

    Looks at configuration, permissions, keys, certificate, names, daemon, port, store, audit log,
    files with secrets, and disk. Each trouble has a code and a remedy.
    """
    from silotune.server.config import Home
    from silotune.server.doctor import CoordinatorDoctor

    site_views.tell_findings(CoordinatorDoctor(Home(folder)).examine(), as_json=as_json)


@app.command()
def status(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """Show the federation, its fingerprints and who is online."""
    found = client_of(folder).get("/status")
    if as_json:
        typer.echo(json.dumps(found))
        return
    online = ", ".join(found["online"]) or "none"
    typer.echo(f"Federation {found['federation']} at {found['url']}")
    typer.echo(f"Authority, by its SHA-256:\n  {found['authority_sha256']}")
    typer.echo(
        f"Sites: {found['sites']} active, online: {online}; roster {found['roster_version']}"
    )
    typer.echo(f"Server certificate: {found['certificate_days_left']:.0f} days left")


@app.command()
def invite(
    site: Annotated[
        str,
        typer.Argument(
            callback=checked_name,
            help="The site's name in the federation, for ever, as in site.toml.",
        ),
    ],
    days: Annotated[float, typer.Option(min=0.001, help="How long the code is valid.")] = 7.0,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Print a one-time code with which a site can ask to be let in.

    Send it to the site's team by a channel you trust. It holds the coordinator's address, the
    fingerprint of its authority and a secret. It lets nobody in: you still approve the request.
    """
    _print_code(client_of(folder).post("/invites", site=site, lifetime=days * 86400), as_json)


@app.command()
def requests(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """List requests to be let in, with the six words to compare by telephone."""
    found = client_of(folder).get("/requests")
    if as_json:
        typer.echo(json.dumps(found))
        return
    if not found:
        typer.echo("No site has asked yet. `silotune coordinator invite SITE` makes a code.")
        return
    for row in found:
        reason = f" ({row['reason']})" if row["reason"] else ""
        say(f"{row['site']}: {row['state']}{reason}, asked on {moment(row['requested_at'])}")
        typer.echo(f"  words    {row['words']}\n  request  {row['request']}")
    if any(row["state"] == "waiting" for row in found):
        say("Compare the six words by telephone, then: silotune coordinator approve SITE")


@app.command()
def approve(
    request: Annotated[str, typer.Argument(help="The request's id, or the site's name.")],
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Let a site in, after its team has read you the same six words.

    It gets a certificate for 90 days, which it renews by itself, and every site sees the new roster.
    """
    found = client_of(folder).post(f"/requests/{request}/approve")
    typer.echo(json.dumps(found) if as_json else f"{found['site']} is in: {found['words']}")


@app.command()
def refuse(
    request: Annotated[str, typer.Argument(help="The request's id, or the site's name.")],
    reason: Annotated[str, typer.Option(help="What the site is told.")] = "",
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Turn a request away; the site needs a new code to ask again."""
    found = client_of(folder).post(f"/requests/{request}/refuse", reason=reason)
    typer.echo(json.dumps(found) if as_json else f"The request of {found['site']} is refused.")


@app.command()
def reseal(
    key_file: sealing.KeyFile = None,
    passphrase_file: sealing.PassphraseFile = None,
    passphrase_env: sealing.PassphraseEnv = None,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Change what opens the sealed keys: another key file, or a passphrase.

    For a stopped coordinator. The sealed files stay as they are; only the key to them is wrapped
    anew. Then name the new secret under [at_rest] in coordinator.toml and start: from that start on
    the old one opens nothing. Until then both do, so that no crash locks the folder.
    """
    from silotune.protocol.envelope import COORDINATOR
    from silotune.server.config import Home
    from silotune.server.coordinator import hold_folder
    from silotune.trust.audit import AuditLog
    from silotune.trust.vault import Vault

    home = Home(folder)
    config = home.load()
    with hold_folder(home.lock_path):
        sealing.reseal(
            Vault(home.keys, config.at_rest, base=home.root),
            sealing.at_rest_of(key_file, passphrase_file, passphrase_env),
            audit=AuditLog(home.audit_path, owner=COORDINATOR),
            config=home.config_path,
            base=home.root,
            as_json=as_json,
        )


@sites.command("list")
def list_sites(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """List the sites, who is online, and their six words."""
    found = client_of(folder).get("/sites")
    if as_json:
        typer.echo(json.dumps(found))
        return
    if not found:
        typer.echo("No sites yet. `silotune coordinator invite SITE` makes a code for the first.")
        return
    rows = [
        {
            **row,
            "online": "yes" if row["online"] else "no",
            "last seen": moment(row["last_seen"]) if row["last_seen"] else "never",
            "books": "went back: not served" if row["books"] else "ok",
        }
        for row in found
    ]
    show_rows(rows, ("site", "status", "online", "last seen", "books", "words"))
    for row in found:
        if row["books"]:
            typer.echo(f"{row['site']} is not served (ST-807): {row['books']}.")


@sites.command()
def revoke(
    site: Annotated[str, typer.Argument(help="The site's name.")],
    reason: Annotated[str, typer.Option(help="For the audit log.")] = "",
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Shut a site out, now and for good: its certificate and keys count no more.

    Rounds that wait for it go on without it. To let it in again, invite it anew: it makes new keys.
    """
    found = client_of(folder).post(f"/sites/{site}/revoke", reason=reason)
    typer.echo(json.dumps(found) if as_json else f"{site} is revoked.")


@sites.command()
def rotate(
    site: Annotated[str, typer.Argument(help="The site's name.")],
    days: Annotated[float, typer.Option(min=0.001, help="How long the code is valid.")] = 7.0,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Print a code with which an active site gets new keys.

    Its old keys work until you approve the request; then only the new ones do.
    """
    asked = {"site": site, "lifetime": days * 86400, "rotate": True}
    _print_code(client_of(folder).post("/invites", **asked), as_json)


def _print_code(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(found["code"])
    typer.echo(
        f"For {found['site']}, once, until {moment(found['expires'])}. "
        "Its team runs: silotune site join CODE",
        err=True,
    )
