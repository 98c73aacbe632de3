"""`silotune admin`: look at a federation and run it, from any machine, through the admin API."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.terminal import show_rows, terminal

if TYPE_CHECKING:
    from silotune.server.admin.client import ControlClient

app = typer.Typer(
    no_args_is_help=True,
    help="""Look at a federation and run it, over gRPC and mutual TLS.

    Needs a folder with credentials, which `silotune coordinator people add` makes. Viewers may look;
    operators may also act. Everything that anybody does is in the coordinator's audit log.
    """,
)

Credentials = Annotated[
    Path,
    typer.Option(
        "--credentials",
        envvar="SILOTUNE_ADMIN",
        help="Folder with the credentials.",
        show_default="./admin",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Run = Annotated[str, typer.Argument(help="The run's name.")]
_HERE = Path("admin")
_FAILED = 60


@app.command()
def runs(credentials: Credentials = _HERE, as_json: AsJson = False) -> None:
    """List runs, newest first."""
    rows = _ask(credentials, "ListRuns", "ListRunsRequest")["runs"]
    shown = [
        {
            **row,
            "round": f"{row['round']} of {row['rounds']}",
            "proposed": _when(row["proposed_at"]),
        }
        for row in rows
    ]
    _show(rows, shown, ("run", "state", "round", "proposed", "purpose"), as_json, "No runs yet.")


@app.command()
def show(run: Run, credentials: Credentials = _HERE, as_json: AsJson = False) -> None:
    """Show a run and where each site is."""
    found = _ask(credentials, "GetRun", "RunRef", run=run)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{found['run']}: {found['state']}, round {found['round']} of {found['rounds']}")
    typer.echo(f"{found['purpose']}\nPlan {found['name']}, SHA-256 {found['plan_sha256']}")
    _show(found["sites"], found["sites"], ("site", "state", "code", "replied", "failed"), False, "")
    typer.echo(f"Files: {', '.join(found['files'])}")


@app.command()
def submit(
    plan: Annotated[Path, typer.Argument(help="The plan's TOML file.")],
    quorum: Annotated[
        int | None, typer.Option(min=1, help="Start when so many sites approve.")
    ] = None,
    credentials: Credentials = _HERE,
    as_json: AsJson = False,
) -> None:
    """Propose a plan to the sites (operators); it is tried first if its base model is here."""
    from silotune.commands.plan import untried
    from silotune.plan.plan import Plan

    checked = Plan.load(plan)
    untried(checked)
    text = checked.canonical()
    more = {} if quorum is None else {"quorum": quorum}
    found = _ask(credentials, "SubmitRun", "SubmitRunRequest", plan=text, **more)
    typer.echo(json.dumps(found) if as_json else f"Run {found['run']} is proposed.")


@app.command()
def pause(run: Run, credentials: Credentials = _HERE, as_json: AsJson = False) -> None:
    """Hold a run after its round (operators)."""
    _act("PauseRun", run, credentials, as_json)


@app.command()
def resume(run: Run, credentials: Credentials = _HERE, as_json: AsJson = False) -> None:
    """Go on with a paused or failed run (operators)."""
    _act("ResumeRun", run, credentials, as_json)


@app.command()
def stop(run: Run, credentials: Credentials = _HERE, as_json: AsJson = False) -> None:
    """End a run for good (operators)."""
    _act("StopRun", run, credentials, as_json)


@app.command()
def watch(
    run: Annotated[
        str, typer.Argument(help="The run's name; none: the federation's own events, for ever.")
    ] = "",
    after: Annotated[int, typer.Option(min=0, help="Only events behind this id.")] = 0,
    credentials: Credentials = _HERE,
    as_json: AsJson = False,
) -> None:
    """Watch a run live until it is over; a restart of the coordinator is waited out.

    On a terminal the view is redrawn in place; elsewhere each event is a line. Exit 60 if it failed.
    """
    from silotune.commands.watch import watch_lines, watch_live

    client, console = _client(credentials), terminal()
    notes = terminal(stderr=True)
    waiting: Callable[[str], None] = notes.print
    if as_json:
        for event in client.watch(run, after=after, waiting=waiting):
            typer.echo(json.dumps(event))
    elif run and console.is_terminal:
        watch_live(client, run, console=console)  # a picture needs every event
    else:
        watch_lines(client, run, after=after, waiting=waiting)
    if not run:
        return
    request = client.messages.RunRef(run=run)
    if client.call("GetRun", request)["state"] == "failed":
        raise typer.Exit(_FAILED)


@app.command()
def sites(credentials: Credentials = _HERE, as_json: AsJson = False) -> None:
    """List the sites."""
    rows = _ask(credentials, "ListSites", "ListSitesRequest")["sites"]
    shown = [{**row, "online": "online" if row["online"] else "offline"} for row in rows]
    _show(rows, shown, ("site", "status", "online", "words"), as_json, "No sites yet.")


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="The site's name.")],
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")] = "",
    credentials: Credentials = _HERE,
) -> None:
    """Shut a site out for good (operators)."""
    _ask(credentials, "RevokeSite", "RevokeSiteRequest", site=site, reason=reason)
    typer.echo(f"{site} is revoked.")


@app.command()
def enrolments(credentials: Credentials = _HERE, as_json: AsJson = False) -> None:
    """List requests to be enrolled."""
    rows = _ask(credentials, "ListEnrolments", "ListEnrolmentsRequest")["enrolments"]
    columns = ("request", "site", "state", "words")
    _show(rows, rows, columns, as_json, "Nobody asks to be enrolled.")


@app.command()
def approve(
    request: Annotated[str, typer.Argument(help="The request's id, as `enrolments` lists it.")],
    credentials: Credentials = _HERE,
) -> None:
    """Let a site in, after you compared its six words by telephone (operators)."""
    found = _ask(credentials, "ApproveEnrolment", "EnrolmentRef", request=request)
    typer.echo(f"{found['target']} is in.")


@app.command()
def refuse(
    request: Annotated[str, typer.Argument(help="The request's id, as `enrolments` lists it.")],
    reason: Annotated[str, typer.Option(help="Why; the site is told.")] = "",
    credentials: Credentials = _HERE,
) -> None:
    """Turn a site away (operators)."""
    message = "RefuseEnrolmentRequest"
    found = _ask(credentials, "RefuseEnrolment", message, request=request, reason=reason)
    typer.echo(f"{found['target']} is refused.")


@app.command()
def download(
    run: Run,
    file: Annotated[str, typer.Argument(help="One that `show` lists.")],
    out: Annotated[Path, typer.Option(help="Where to write it.")],
    credentials: Credentials = _HERE,
) -> None:
    """Fetch the adapter, the signed plan or the events of a run."""
    from silotune.trust.files import replace_file

    content = _client(credentials).download(run, file)
    replace_file(out, content)
    typer.echo(f"Wrote {len(content):,} bytes to {out}")


@app.command()
def actions(credentials: Credentials = _HERE, as_json: AsJson = False) -> None:
    """List what people did, newest first."""
    rows = _ask(credentials, "ListActions", "ListActionsRequest")["actions"]
    shown = [{**row, "time": _when(row["time"])} for row in rows]
    columns = ("time", "who", "role", "action", "target", "outcome")
    _show(rows, shown, columns, as_json, "Nobody did anything yet.")


def _client(credentials: Path) -> ControlClient:
    from silotune.server.admin.client import ControlClient

    return ControlClient(credentials)


def _ask(credentials: Path, call: str, message: str, /, **fields: Any) -> dict[str, Any]:
    client = _client(credentials)
    try:
        return client.call(call, getattr(client.messages, message)(**fields))
    finally:
        client.close()


def _act(call: str, run: str, credentials: Path, as_json: bool) -> None:
    found = _ask(credentials, call, "RunRef", run=run)
    typer.echo(json.dumps(found) if as_json else f"{run}: {found['state']}")


def _show(
    rows: list[Any], shown: list[Any], columns: tuple[str, ...], as_json: bool, empty: str
) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
        return
    if not rows:
        typer.echo(empty)
        return
    show_rows(shown, columns)


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
