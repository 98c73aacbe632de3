"""`silotune admin`: look at a federation and run it, from any machine, through the admin API."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from silotune.commands.folder import AsJson, end_as, list_rows, tell
from silotune.events.schema import in_a_line
from silotune.events.view import RunView
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
Run = Annotated[str, typer.Argument(help="The run's name.")]
Request = Annotated[
    str, typer.Argument(help="The request's id, as `enrolments` lists it, or the site's name.")
]
_HERE = Path("admin")
_STYLES = {"training": "cyan", "masked": "blue", "done": "green", "late": "yellow"}
_TROUBLE = {"failed": "red", "refused": "red", "rejected": "red", "silent": "red"}
_MOST_SITES = 40


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
    columns = ("run", "state", "round", "proposed", "purpose")
    list_rows(rows, shown, columns, as_json=as_json, empty="No runs yet.")


@app.command()
def show(run: Run, credentials: Credentials = _HERE, as_json: AsJson = False) -> None:
    """Show a run and where each site is."""
    found = _ask(credentials, "GetRun", "RunRef", run=run)
    head = f"{found['run']}: {found['state']}, round {found['round']} of {found['rounds']}"
    plan = f"Plan {found['name']}, SHA-256 {found['plan_sha256']}"
    tell(found, f"{head}\n{found['purpose']}\n{plan}", as_json=as_json)
    if as_json:
        return
    if found["sites"]:
        show_rows(found["sites"], ("site", "state", "code", "replied", "failed"))
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
    tell(found, f"Run {found['run']} is proposed.", as_json=as_json)


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
    client, console = _client(credentials), terminal()
    notes = terminal(stderr=True)
    waiting: Callable[[str], None] = notes.print
    if as_json:
        for event in client.watch(run, after=after, waiting=waiting):
            typer.echo(json.dumps(event))
    elif run and console.is_terminal:
        watch_live(client, run, console=console)  # a picture needs every event
    else:
        for event in client.watch(run, after=after, waiting=waiting):
            typer.echo(line(event))
    if run:
        end_as(client.call("GetRun", client.messages.RunRef(run=run))["state"])


@app.command()
def sites(credentials: Credentials = _HERE, as_json: AsJson = False) -> None:
    """List the sites."""
    rows = _ask(credentials, "ListSites", "ListSitesRequest")["sites"]
    shown = [{**row, "online": "online" if row["online"] else "offline"} for row in rows]
    columns = ("site", "status", "online", "words")
    list_rows(rows, shown, columns, as_json=as_json, empty="No sites yet.")


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
    list_rows(rows, rows, columns, as_json=as_json, empty="Nobody asks to be enrolled.")


@app.command()
def approve(
    request: Request,
    credentials: Credentials = _HERE,
) -> None:
    """Let a site in, after you compared its six words by telephone (operators)."""
    found = _ask(credentials, "ApproveEnrolment", "EnrolmentRef", request=request)
    typer.echo(f"{found['target']} is in.")


@app.command()
def refuse(
    request: Request,
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
    list_rows(rows, shown, columns, as_json=as_json, empty="Nobody did anything yet.")


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
    tell(found, f"{run}: {found['state']}", as_json=as_json)


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def watch_live(client: ControlClient, run: str, *, console: Console) -> None:
    """Redraw the run at each event, until it is over."""
    view, note = RunView(run), ""

    def waiting(why: str) -> None:
        nonlocal note
        note = why
        live.update(picture(view, note=note, now=time.time()))

    with Live(console=console, refresh_per_second=4, transient=False) as live:
        for event in client.watch(run, waiting=waiting):
            note = ""
            view.extend([event])
            live.update(picture(view, note=note, now=time.time()))


def line(event: dict[str, Any]) -> str:
    """An event in one line."""
    return f"{event['id']:>6} {in_a_line(event, hidden=('run',))}"


def picture(view: RunView, *, note: str, now: float) -> RenderableType:
    """The run as it is now."""
    head = Text.assemble(
        (view.run, "bold"),
        f"   {view.state}",
        f"   round {view.done} of {view.planned}",
        f"   {_ago(now, view.last_time)}",
    )
    bar = ProgressBar(total=max(view.planned, 1), completed=view.done)
    table = Table(box=None, expand=True, padding=(0, 1))
    for column in ("site", "state", "rounds", "lost", "\N{GREEK SMALL LETTER EPSILON}"):
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    for site in list(view.sites.values())[:_MOST_SITES]:
        style = _STYLES.get(site.state, "") or _TROUBLE.get(site.state, "")
        spent = "" if site.epsilon is None else f"{site.epsilon:.2f}"
        state = Text(f"{site.state} {site.code}".strip(), style=style)
        table.add_row(Text(site.name), state, str(site.replied), str(site.failed), spent)
    return Group(head, bar, table, Text(note, style="yellow"))


def _ago(now: float, then: float | None) -> str:
    return "" if then is None else f"last event {max(0, round(now - then))} s ago"
