"""Runs over simulated sites: `silotune partition` makes them of a file, `simulate` runs a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from silotune.commands.folder import AsJson
from silotune.commands.plan import Overrides, parsed
from silotune.terminal import headed, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from silotune.data.columns import Role
    from silotune.data.partition import Partitioner
    from silotune.rounds.run_directory import RunDirectory
    from silotune.simulation.run import EngineName, Settings


class How(StrEnum):
    """Ways to divide."""

    COLUMN = "column"
    IID = "iid"
    LABELS = "labels"
    QUANTITY = "quantity"


def partition(  # noqa: PLR0917 - one a command-line option
    source: Annotated[
        Path,
        typer.Argument(
            help="A .csv, .jsonl, .json, .parquet, .arrow or .xlsx file; .gz and .zst too."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Where to make the site folders.")],
    column: Annotated[
        list[str],
        typer.Option(
            "--column", help="role=column, e.g. --column text=note --column label=diagnosis"
        ),
    ],
    by: Annotated[
        How,
        typer.Option(
            help="column: a site for each value of --key. iid: at random. labels: uneven labels "
            "(Dirichlet). quantity: uneven sizes (Dirichlet)."
        ),
    ] = How.IID,
    sites: Annotated[int, typer.Option(min=1, help="How many, but for --by column.")] = 5,
    alpha: Annotated[
        float, typer.Option(min=1e-3, help="Dirichlet parameter: small is uneven.")
    ] = 0.5,
    key: Annotated[str, typer.Option(help="The column to divide by, for --by column.")] = "",
    unit: Annotated[
        str, typer.Option(help="'record', or what one value of the unit column is: patient, ...")
    ] = "record",
    dataset: Annotated[str, typer.Option(help="Name that plans ask for.")] = "records",
    epsilon: Annotated[float, typer.Option(min=0.0, help="Budget of each site.")] = 10.0,
    delta: Annotated[float, typer.Option(min=0.0, help="Budget of each site.")] = 1e-5,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
) -> None:
    """Divide one data file into site folders, to simulate a federation that does not exist yet.

    Every row goes to exactly one site, and a unit (a patient, say) is never split between two.
    """
    from silotune.data.partition import partition_file
    from silotune.data.site import BudgetConfig

    parts = partition_file(
        source,
        folder,
        partitioner=_partitioner(by, sites=sites, alpha=alpha, key=key),
        columns=_columns(column),
        budget=BudgetConfig(epsilon=epsilon, delta=delta),
        dataset=dataset,
        unit=unit,
        seed=seed,
    )
    lines = [f"{part.folder}: {part.records:,} records of {part.units:,} units" for part in parts]
    terminal().print(*lines, sep="\n")


def _columns(given: list[str]) -> dict[Role, str]:
    from silotune.data.columns import Role

    found: dict[Role, str] = {}
    for text in given:
        role, sign, name = text.partition("=")
        if not sign or not name or role not in get_args(Role):
            roles = ", ".join(get_args(Role))
            raise typer.BadParameter(
                f"{text!r}: give role=column with one of {roles}", param_hint="--column"
            )
        found[cast("Role", role)] = name
    return found


def _partitioner(by: How, *, sites: int, alpha: float, key: str) -> Partitioner:
    from silotune.data.partition import ByColumn, DirichletLabels, Iid, QuantitySkew

    if by is How.COLUMN and not key:
        raise typer.BadParameter("--by column needs --key COLUMN", param_hint="--key")
    made: dict[How, Partitioner] = {
        How.COLUMN: ByColumn(key),
        How.IID: Iid(sites),
        How.LABELS: DirichletLabels(sites, alpha),
        How.QUANTITY: QuantitySkew(sites, alpha),
    }
    return made[by]


PlanPath = Annotated[
    Path | None, typer.Argument(help="The plan's TOML file; its folder holds one folder a site.")
]
Sites = Annotated[
    Path | None, typer.Option(help="Folder of the site folders, if not the plan's own.")
]
Engine = Annotated[
    str, typer.Option(help="'processes' on this machine, or 'ray' (Flower's Ray engine).")
]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster, with --engine ray.")]
Baselines = Annotated[
    bool,
    typer.Option(
        "--baselines",
        help="Also train each site alone, pooled records, and a head on frozen features.",
    ),
]
Attack = Annotated[
    bool,
    typer.Option(
        "--attack",
        help="Attack the result too: an audited step, and the run again with planted canaries. "
        "With --resume also a finished run.",
    ),
]
Isolate = Annotated[
    bool,
    typer.Option(
        "--isolate",
        help="Read records and train in confined processes, one a site, as real sites do.",
    ),
]
Resume = Annotated[
    Path | None, typer.Option(help="Go on with this run directory instead of a new run.")
]


def simulate(  # noqa: PLR0917 - one a command-line option
    plan: PlanPath = None,
    sites: Sites = None,
    runs: Annotated[Path, typer.Option(help="Where to put the run directory.")] = Path("runs"),
    workers: Annotated[int, typer.Option(min=0, help="Worker processes; 0 takes one a core.")] = 0,
    engine: Engine = "processes",
    address: Address = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    baselines: Baselines = False,
    attack: Attack = False,
    overrides: Overrides = None,
    resume: Resume = None,
    isolate: Isolate = False,
    as_json: AsJson = False,
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
    from silotune.rounds.run_directory import RunDirectory
    from silotune.simulation import run

    settings = run.Settings(
        engine=cast("EngineName", engine),
        workers=workers,
        baselines=baselines,
        address=address,
        device=device,
        isolate=isolate,
    )
    console = terminal(stderr=as_json)
    if plan is not None:
        told = {"runs": runs, "sites_folder": sites, "overrides": parsed(overrides or [])}
        directory = _played(run.simulate, plan, console=console, settings=settings, **told)
    else:
        assert resume is not None
        directory = RunDirectory.open(resume)
        if not attack or directory.find_json("results.json") is None:
            _played(run.resume, resume, console=console, settings=settings)
    if attack:
        _attack(directory, settings, console)
    _tell(directory, console, attacked=attack, as_json=as_json)


def _played(
    play: Callable[..., RunDirectory], path: Path, *, console: Console, **settings: Any
) -> RunDirectory:
    """A new run, or the rest of one, with progress."""
    from silotune.simulation.progress import Progress

    def note(sentence: str) -> None:
        line = headed("Note.", f"{sentence}.", style="yellow")
        console.print(line, soft_wrap=not console.is_terminal)

    with Progress(console) as progress:
        return play(path, listener=progress, note=note, **settings)


def _attack(directory: RunDirectory, settings: Settings, console: Console) -> None:
    """Attack a finished run; what is being done is on the console meanwhile."""
    from silotune.simulation.attack import attack

    with console.status("Attacking") as status:

        def say(sentence: str) -> None:
            status.update(sentence)
            if not console.is_terminal:
                console.print(sentence)

        attack(directory, settings=settings, say=say)


def _tell(directory: RunDirectory, console: Console, *, attacked: bool, as_json: bool) -> None:
    """What came of it, and where everything is."""
    from silotune.report.report import print_summary, summary, write_report
    from silotune.report.verdict import attack_sentences

    page = write_report(directory.root)
    attacks = directory.find_json("attacks.json") if attacked else None
    if as_json:
        facts = {**summary(directory.root), "run_directory": str(directory.root)}
        typer.echo(json.dumps(facts | ({"attacks": attacks} if attacked else {})))
        return
    print_summary(directory.root, console)
    if attacked:
        console.print()
        for sentence in attack_sentences(attacks):
            console.print(sentence)
    console.print(f"Run directory: {directory.root}", soft_wrap=True)  # to be copied whole
    console.print(f"Report:        {page}", soft_wrap=True)
