"""`silotune coordinator`: make a federation, run its coordinator, let sites and people in, run plans."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.commands import folder as sealing
from silotune.commands import site as site_views
from silotune.commands.folder import (
    HERE,
    AsJson,
    Folder,
    checked_name,
    checked_role,
    client_of,
    end_as,
    list_rows,
    moment,
    tell,
)
from silotune.commands.plan import untried
from silotune.commands.statistics import statistics
from silotune.commands.vote import votes
from silotune.events.schema import in_a_line
from silotune.plan.plan import Plan
from silotune.terminal import say

if TYPE_CHECKING:
    from silotune.server.admin.socket_client import AdminClient

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
runs = typer.Typer(no_args_is_help=True, help="Look at runs; pause, resume or stop one.")
app.add_typer(runs, name="runs")
people = typer.Typer(
    no_args_is_help=True,
    help="""Give people certificates for the admin API and the dashboard; take them back.

    A viewer may look at everything and change nothing; an operator may also propose, pause and stop
    runs, and let sites in or out.
    """,
)
app.add_typer(people, name="people")

Site = Annotated[str, typer.Argument(help="The site's name.")]
Asked = Annotated[str, typer.Argument(help="The request's id, or the site's name.")]
Days = Annotated[float, typer.Option(min=0.001, help="How long the code is valid.")]
Run = Annotated[str, typer.Argument(help="The run's name, as `run` printed it.")]
PersonName = Annotated[
    str, typer.Argument(callback=checked_name, help="The person's name: a-z, 0-9, - and _.")
]
Role = Annotated[str, typer.Option(help="viewer or operator.", callback=checked_role)]


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
    found = {
        "folder": str(folder.resolve()),
        "federation": config.federation.name,
        "authority_sha256": keys.fingerprint,
    }
    tell(
        found,
        f"Federation {name} is in {folder}. Its authority has the SHA-256 fingerprint\n"
        f"  {keys.fingerprint}\n"
        f"Look at {folder / 'coordinator.toml'}, then: silotune coordinator start --dir {folder}",
        as_json=as_json,
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
    online = ", ".join(found["online"]) or "none"
    tell(
        found,
        f"Federation {found['federation']} at {found['url']}\n"
        f"Authority, by its SHA-256:\n  {found['authority_sha256']}\n"
        f"Sites: {found['sites']} active, online: {online}; roster {found['roster_version']}\n"
        f"Server certificate: {found['certificate_days_left']:.0f} days left",
        as_json=as_json,
    )


@app.command()
def invite(
    site: Annotated[
        str,
        typer.Argument(
            callback=checked_name,
            help="The site's name in the federation, for ever, as in site.toml.",
        ),
    ],
    days: Days = 7.0,
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
    request: Asked,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Let a site in, after its team has read you the same six words.

    It gets a certificate for 90 days, which it renews by itself, and every site sees the new roster.
    """
    found = client_of(folder).post(f"/requests/{request}/approve")
    tell(found, f"{found['site']} is in: {found['words']}", as_json=as_json)


@app.command()
def refuse(
    request: Asked,
    reason: Annotated[str, typer.Option(help="What the site is told.")] = "",
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Turn a request away; the site needs a new code to ask again."""
    found = client_of(folder).post(f"/requests/{request}/refuse", reason=reason)
    tell(found, f"The request of {found['site']} is refused.", as_json=as_json)


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
    shown = [
        {
            **row,
            "online": "yes" if row["online"] else "no",
            "last seen": moment(row["last_seen"]) if row["last_seen"] else "never",
            "books": "went back: not served" if row["books"] else "ok",
        }
        for row in found
    ]
    columns = ("site", "status", "online", "last seen", "books", "words")
    empty = "No sites yet. `silotune coordinator invite SITE` makes a code for the first."
    list_rows(found, shown, columns, as_json=as_json, empty=empty)
    for row in found:
        if row["books"] and not as_json:
            typer.echo(f"{row['site']} is not served (ST-807): {row['books']}.")


@sites.command()
def revoke(
    site: Site,
    reason: Annotated[str, typer.Option(help="For the audit log.")] = "",
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Shut a site out, now and for good: its certificate and keys count no more.

    Rounds that wait for it go on without it. To let it in again, invite it anew: it makes new keys.
    """
    found = client_of(folder).post(f"/sites/{site}/revoke", reason=reason)
    tell(found, f"{site} is revoked.", as_json=as_json)


@sites.command()
def rotate(
    site: Site,
    days: Days = 7.0,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Print a code with which an active site gets new keys.

    Its old keys work until you approve the request; then only the new ones do.
    """
    _print_code(client_of(folder).post(f"/sites/{site}/rotate", lifetime=days * 86400), as_json)


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


@app.command("run")
def propose(
    plan: Annotated[Path, typer.Argument(help="The plan's TOML file.")],
    quorum: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Start when so many sites approve. By default: when all active sites do, "
            "or when all have decided and the plan's rounds.min_sites approve.",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay, and show what happens until it is over.")
    ] = False,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Sign a plan, propose it to the sites, and run it when enough of them approve.

    The plan is checked here first, and tried on the base model if that is on this machine: a plan
    that the model does not take is not proposed. What is signed is its canonical form, and its
    SHA-256 is what each site approves; a changed plan is another plan.
    """
    checked = Plan.load(plan)
    why = untried(checked)
    client = client_of(folder)
    found = client.post("/runs", plan=checked.canonical(), quorum=quorum)
    waiting = [d["site"] for d in found["decisions"] if d["verdict"] == "waiting"]
    untold = f"Not tried on the base model, {why}: each site does before it approves.\n"
    tell(
        found,
        f"Run {found['run']} is proposed; plan {found['plan_sha256'][:12]}.\n"
        f"{untold if why else ''}"
        f"Waiting for {', '.join(waiting)} (silotune site plans, silotune site approve).",
        as_json=as_json,
    )
    if watch:
        _follow(client, found["run"], as_json=as_json)


@runs.command("list")
def list_runs(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """List runs, newest first."""
    found = client_of(folder).get("/runs")
    shown = [
        {
            "run": row["run"],
            "state": _state(row),
            "round": f"{row['round']} of {row['rounds']}",
            "proposed": moment(row["proposed_at"]),
            "plan": row["plan_sha256"][:12],
        }
        for row in found
    ]
    empty = "No runs yet. `silotune coordinator run plan.toml` proposes the first."
    columns = ("run", "state", "round", "proposed", "plan")
    list_rows(found, shown, columns, as_json=as_json, empty=empty)


@runs.command()
def show(run: Run, folder: Folder = HERE, as_json: AsJson = False) -> None:
    """Show a run: its state, and what each site said to the plan."""
    found = client_of(folder).get(f"/runs/{run}")
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{found['run']}: {_state(found)}, round {found['round']} of {found['rounds']}")
    typer.echo(f"Plan {found['plan_name']}, SHA-256 {found['plan_sha256']}")
    if found["detail"]:
        typer.echo(f"Why: {found['detail']}")
    for decision in found["decisions"]:
        reason = f" ({decision['reason']})" if decision["reason"] else ""
        typer.echo(f"  {decision['site']}: {decision['verdict']}{reason}")


@runs.command()
def watch(
    run: Run,
    after: Annotated[
        int, typer.Option(min=0, help="Only events behind this id: to go on watching.")
    ] = 0,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show what happens in a run, line by line, until it is over; exit 60 if it failed."""
    _follow(client_of(folder), run, as_json=as_json, after=after)


@runs.command()
def pause(run: Run, folder: Folder = HERE, as_json: AsJson = False) -> None:
    """Pause a run after the round that is under way."""
    _act(run, "pause", folder, as_json)


@runs.command()
def resume(run: Run, folder: Folder = HERE, as_json: AsJson = False) -> None:
    """Go on with a paused or failed run, from its last finished round.

    Nobody works twice: what sites sent in the unfinished round is still here.
    """
    _act(run, "resume", folder, as_json)


@runs.command()
def stop(run: Run, folder: Folder = HERE, as_json: AsJson = False) -> None:
    """End a run for good. Its last finished adapter is kept."""
    _act(run, "stop", folder, as_json)


@runs.command()
def adapter(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder to write; made if need be.")],
    peft: Annotated[
        bool,
        typer.Option(help="Also in PEFT's own format, which needs the base model on this machine."),
    ] = True,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Write a run's newest adapter: after its last finished round, or the final one."""
    import hashlib

    from silotune.rounds.run_directory import unpacked
    from silotune.trust.files import replace_file
    from silotune.trust.signed import SignedPlan

    client = client_of(folder)
    content = client.download(run, "adapter.safetensors")
    number = int(unpacked(content)[1]["round"])
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"round-{number:04d}.safetensors"
    replace_file(path, content)
    if peft:
        signed = SignedPlan.model_validate_json(client.download(run, "plan.json"))
        _write_peft(content, Plan.from_canonical(signed.plan), out)
    digest = hashlib.sha256(content).hexdigest()
    found = {"run": run, "round": number, "path": str(path), "sha256": digest}
    tell(found, f"Adapter of {run} after round {number}: {path}", as_json=as_json)


runs.command("statistics")(statistics)
runs.command("votes")(votes)


def _write_peft(content: bytes, plan: Plan, out: Path) -> None:
    from safetensors.numpy import load

    from silotune.models.adapter import save_adapter
    from silotune.models.base import load_model

    model = load_model(plan, device="cpu")
    save_adapter(model, model.layout.pack(load(content)), out, plan=plan)


def _follow(client: AdminClient, run: str, *, as_json: bool, after: int = 0) -> None:
    for event in client.watch(run, after=after):
        typer.echo(json.dumps(event) if as_json else in_a_line(event))
    found = client.get(f"/runs/{run}")
    if not as_json:
        typer.echo(f"{run}: {_state(found)}")
    end_as(found["state"])


def _act(run: str, action: str, folder: Path, as_json: bool) -> None:
    found = client_of(folder).post(f"/runs/{run}/{action}")
    tell(found, f"{run}: {_state(found)}", as_json=as_json)


def _state(row: dict[str, Any]) -> str:
    return f"{row['state']} ({row['code']})" if row["code"] else str(row["state"])


@people.command("add")
def add_person(
    name: PersonName,
    role: Role,
    out: Annotated[Path, typer.Option(help="Folder for the credentials; made if need be.")],
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Make a key and a certificate of 90 days; an earlier certificate of that name ends.

    The folder holds the private key: give it to the person over a safe way, and to nobody else.
    """
    from silotune.server.admin.client import AdminAddress, save_credentials
    from silotune.trust import identity

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
    tried = f"Try: silotune admin --credentials {out} runs"
    off = "The admin API is off: set port under [admin] in coordinator.toml and restart."
    tell(
        {"name": name, "role": role, "credentials": str(out)},
        f"{name} is {'an' if role == 'operator' else 'a'} {role}; credentials are in {out}.\n"
        f"{tried if found['address'] else off}",
        as_json=as_json,
    )


@people.command("list")
def list_people(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """Show who has or had a certificate."""
    found = client_of(folder).get("/people")
    shown = [
        {**row, "since": moment(row["since"]), "certificate": row["certificate"][:16]}
        for row in found
    ]
    columns = ("name", "role", "status", "since", "certificate")
    list_rows(found, shown, columns, as_json=as_json, empty="Nobody has a certificate yet.")


@people.command("revoke")
def revoke_person(
    name: Annotated[str, typer.Argument(help="Whose certificate and password end.")],
    folder: Folder = HERE,
) -> None:
    """Let a person's certificate and password count no more, from the next request on."""
    ended = client_of(folder).post(f"/people/{name}/revoke")["ended"]
    typer.echo(f"{name}'s {' and '.join(ended)} {'are' if ended[1:] else 'is'} revoked.")


@people.command("password")
def set_password(
    name: PersonName,
    role: Role,
    folder: Folder = HERE,
) -> None:
    """Let a person sign in at the dashboard with a password, which is asked for twice.

    Only its scrypt hash is kept. From a pipe, the first line is the password.
    """
    import sys

    if sys.stdin.isatty():
        given = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    else:
        given = sys.stdin.readline().rstrip("\n")
    client_of(folder).post(f"/people/{name}/password", role=role, password=given)
    typer.echo(f"{name} may sign in as {role}.")
