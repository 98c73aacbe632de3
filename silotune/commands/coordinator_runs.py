"""`silotune coordinator run` and `runs`: propose plans, and look after the runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from silotune.commands.folder import HERE, AsJson, Folder, client_of, moment
from silotune.commands.plan import untried
from silotune.events.schema import in_a_line
from silotune.plan.plan import Plan
from silotune.terminal import terminal

if TYPE_CHECKING:
    from silotune.server.admin.socket_client import AdminClient

runs = typer.Typer(no_args_is_help=True, help="Look at runs; pause, resume or stop one.")

Run = Annotated[str, typer.Argument(help="The run's name, as `run` printed it.")]
_FAILED = 60  # the exit code of a run that could not go on


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `silotune coordinator`."""
    app.command("run")(propose)
    app.add_typer(runs, name="runs")


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
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo(f"Run {found['run']} is proposed; plan {found['plan_sha256'][:12]}.")
        if why:
            typer.echo(f"Not tried on the base model, {why}: each site does before it approves.")
        waiting = [d["site"] for d in found["decisions"] if d["verdict"] == "waiting"]
        typer.echo(
            f"Waiting for {', '.join(waiting)} (silotune site plans, silotune site approve)."
        )
    if watch:
        _follow(client, found["run"], as_json=as_json)


@runs.command("list")
def list_runs(folder: Folder = HERE, as_json: AsJson = False) -> None:
    """List runs, newest first."""
    found = client_of(folder).get("/runs")
    if as_json:
        typer.echo(json.dumps(found))
        return
    if not found:
        typer.echo("No runs yet. `silotune coordinator run plan.toml` proposes the first.")
        return
    table = Table()
    for column in ("run", "state", "round", "proposed", "plan"):
        table.add_column(column, overflow="fold")
    for row in found:
        table.add_row(
            row["run"],
            _state(row),
            f"{row['round']} of {row['rounds']}",
            moment(row["proposed_at"]),
            row["plan_sha256"][:12],
        )
    terminal().print(table)


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

    from silotune.trust.files import replace_file

    client = client_of(folder)
    content, headers = client.download(f"/runs/{run}/adapter")
    number, digest = int(headers["silotune-round"]), hashlib.sha256(content).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"round-{number:04d}.safetensors"
    replace_file(path, content)
    if peft:
        _write_peft(content, client.get(f"/runs/{run}/plan"), out)
    if as_json:
        typer.echo(json.dumps({"run": run, "round": number, "path": str(path), "sha256": digest}))
        return
    typer.echo(f"Adapter of {run} after round {number}: {path}")


def _write_peft(content: bytes, plan: dict[str, Any], out: Path) -> None:
    from safetensors.numpy import load

    from silotune.models.adapter import save_adapter
    from silotune.models.base import load_model

    parsed = Plan.from_canonical(json.dumps(plan))
    model = load_model(parsed, device="cpu")
    save_adapter(model, model.layout.pack(load(content)), out, plan=parsed)


def _follow(client: AdminClient, run: str, *, as_json: bool, after: int = 0) -> None:
    for event in client.watch(run, after=after):
        typer.echo(json.dumps(event) if as_json else in_a_line(event))
    state = client.get(f"/runs/{run}")
    if not as_json:
        typer.echo(f"{run}: {_state(state)}")
    if state["state"] == "failed":
        raise typer.Exit(_FAILED)


def _act(run: str, action: str, folder: Path, as_json: bool) -> None:
    found = client_of(folder).post(f"/runs/{run}/{action}")
    typer.echo(json.dumps(found) if as_json else f"{run}: {_state(found)}")


def _state(row: dict[str, Any]) -> str:
    return f"{row['state']} ({row['code']})" if row["code"] else str(row["state"])
