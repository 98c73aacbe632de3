"""`silotune simulate`: run a plan over simulated sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.plan.explain import Overrides, parsed
from silotune.terminal import headed, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from silotune.rounds.run_directory import RunDirectory
    from silotune.simulation.run import Settings


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
    attack: Annotated[
        bool,
        typer.Option(
            "--attack",
            help="Attack the result too: an audited step, and the run again with planted canaries. "
            "With --resume also a finished run.",
        ),
    ] = False,
    overrides: Overrides = None,
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
    _run(
        plan,
        resume,
        runs=runs,
        sites=sites,
        settings=settings,
        sets=overrides,
        as_json=as_json,
        attacked=attack,
    )


def _run(
    plan: Path | None,
    resumed: Path | None,
    *,
    sites: Path | None,
    runs: Path,
    settings: dict[str, Any],
    sets: list[str] | None,
    as_json: bool,
    attacked: bool,
) -> None:
    """Run or go on, with progress, and say where everything is."""
    from silotune.report.report import print_summary, summary, write_report
    from silotune.rounds.run_directory import RunDirectory
    from silotune.simulation.run import Settings

    console = terminal(stderr=as_json)
    chosen = Settings(**settings)
    if resumed is not None and attacked and _is_finished(resumed):
        directory = RunDirectory.open(resumed)
    else:
        directory = _played(
            plan, resumed, sites=sites, runs=runs, chosen=chosen, sets=sets, console=console
        )
    if attacked:
        _attack(directory, chosen, console)
    page = write_report(directory.root)
    if as_json:
        facts = {**summary(directory.root), "run_directory": str(directory.root)}
        if attacked:
            facts["attacks"] = directory.find_json("attacks.json")
        typer.echo(json.dumps(facts))
        return
    print_summary(directory.root, console)
    if attacked:
        _print_attacks(directory, console)
    console.print(f"Run directory: {directory.root}", soft_wrap=True)  # to be copied whole
    console.print(f"Report:        {page}", soft_wrap=True)


def _played(
    plan: Path | None,
    resumed: Path | None,
    *,
    sites: Path | None,
    runs: Path,
    chosen: Settings,
    sets: list[str] | None,
    console: Console,
) -> RunDirectory:
    """A new run, or the rest of one, with progress."""
    from silotune.simulation.progress import Progress
    from silotune.simulation.run import resume, simulate

    def note(sentence: str) -> None:
        line = headed("Note.", f"{sentence}.", style="yellow")
        console.print(line, soft_wrap=not console.is_terminal)

    with Progress(console) as progress:
        if plan is None:
            assert resumed is not None
            return resume(resumed, settings=chosen, listener=progress, note=note)
        return simulate(
            plan,
            runs=runs,
            settings=chosen,
            listener=progress,
            sites_folder=sites,
            overrides=parsed(sets or []),
            note=note,
        )


def _is_finished(path: Path) -> bool:
    from silotune.rounds.run_directory import RunDirectory

    return RunDirectory.open(path).find_json("results.json") is not None


def _attack(directory: RunDirectory, settings: Settings, console: Console) -> None:
    """Attack a finished run; what is being done is on the console meanwhile."""
    from silotune.simulation.attack import attack

    with console.status("Attacking") as status:

        def say(sentence: str) -> None:
            status.update(sentence)
            if not console.is_terminal:
                console.print(sentence)

        attack(directory, settings=settings, say=say)


def _print_attacks(directory: RunDirectory, console: Console) -> None:
    from silotune.report.verdict import attack_sentences

    console.print()
    for sentence in attack_sentences(directory.find_json("attacks.json")):
        console.print(sentence)
