"""`silotune simulate`: run a plan over simulated sites."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from silotune.errors import PlanInvalid
from silotune.terminal import terminal


def simulate(  # noqa: PLR0917 - one a command-line option
    plan: Annotated[
        Path | None,
        typer.Argument(help="The plan's TOML file; its folder holds one folder a site."),
    ] = None,
    sites: Annotated[
        Path | None, typer.Option(help="Folder of the site folders, if not the plan's own.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where to put the run directory.")] = Path("runs"),
    workers: Annotated[int, typer.Option(min=0, help="Worker processes; 0 takes one a core.")] = 0,
    engine: Annotated[
        str, typer.Option(help="'processes' on this machine, or 'ray' (Flower's Ray engine).")
    ] = "processes",
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster, with --engine ray.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also train each site alone, pooled records, and a head on frozen features.",
        ),
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace a plan setting, e.g. --set privacy.epsilon=3"),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run directory instead of a new run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a plan over simulated sites on this machine.

    The sites are the folders beside the plan that hold a site.toml. Everything a deployment would do
    is done, privacy and ledgers included; only the network is missing. The run directory keeps the
    adapter, the sites' ledgers and certificates, and a report.
    """
    if engine not in {"processes", "ray"}:
        raise typer.BadParameter("use 'processes' or 'ray'", param_hint="--engine")
    if (plan is None) == (resume is None):
        raise typer.BadParameter("give a plan, or --resume with a run directory")
    settings = {"engine": engine, "workers": workers, "address": address, "device": device}
    settings |= {"baselines": baselines}
    _run(plan, resume, runs=runs, sites=sites, settings=settings, sets=overrides, as_json=as_json)


def _run(
    plan: Path | None,
    resumed: Path | None,
    *,
    sites: Path | None,
    runs: Path,
    settings: dict[str, Any],
    sets: list[str] | None,
    as_json: bool,
) -> None:
    """Run or go on, with progress, and say where everything is."""
    from silotune.simulation.progress import Progress
    from silotune.simulation.report import write_report
    from silotune.simulation.run import Settings, resume, simulate
    from silotune.simulation.summary import print_summary, summary

    console = terminal(stderr=as_json)
    chosen = Settings(**settings)
    with Progress(console) as progress:
        if plan is None:
            assert resumed is not None
            directory = resume(resumed, settings=chosen, listener=progress)
        else:
            directory = simulate(
                plan,
                runs=runs,
                settings=chosen,
                listener=progress,
                sites_folder=sites,
                overrides=_parsed(sets or []),
            )
    page = write_report(directory.root)
    if as_json:
        typer.echo(json.dumps({**summary(directory.root), "run_directory": str(directory.root)}))
        return
    print_summary(directory.root, console)
    console.print(f"Run directory: {directory.root}", soft_wrap=True)  # to be copied whole
    console.print(f"Report:        {page}", soft_wrap=True)


def _parsed(settings: list[str]) -> dict[str, Any]:
    """``key=value`` with values as TOML; an empty value removes the key."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign or not key:
            raise PlanInvalid(f"--set {setting}: expected key=value")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"] if text else None
        except tomllib.TOMLDecodeError:
            found[key] = text  # a bare word is a string
    return found
