"""Runs over simulated sites: `silotune partition` makes them of a file, `simulate` runs a plan."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from silotune.commands.asked import Device
from silotune.commands.folder import AsJson
from silotune.commands.plan import Overrides, parsed
from silotune.terminal import terminal

if TYPE_CHECKING:
    from rich.console import Console

    from silotune.api.run import Run
    from silotune.data.columns import Role
    from silotune.data.partition import Partitioner


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
    from silotune.api.site import partition as divided

    parts = divided(
        source,
        folder,
        by=_partitioner(by, sites=sites, alpha=alpha, key=key),
        columns=_columns(column),
        dataset=dataset,
        unit=unit,
        epsilon=epsilon,
        delta=delta,
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
    device: Device = "auto",
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
    from silotune.api import simulating

    console = terminal(stderr=as_json)
    how: dict[str, Any] = {
        "engine": engine,
        "workers": workers,
        "baselines": baselines,
        "address": address,
        "device": device,
        "isolate": isolate,
        "attack": attack,
        "progress": console,
    }
    if plan is not None:
        settings = parsed(overrides or [])
        done = simulating.simulate(plan, sites=sites, runs=runs, settings=settings, **how)
    else:
        assert resume is not None
        done = simulating.resume(resume, **how)
    _tell(done, console, attacked=attack, as_json=as_json)


def _tell(run: Run, console: Console, *, attacked: bool, as_json: bool) -> None:
    """What came of it, and where everything is."""
    from silotune.report.report import print_summary

    page = run.report()
    if as_json:
        facts = {**run.to_json(), "run_directory": str(run.folder)}
        if attacked:
            facts["attacks"] = run.record.directory.find_json("attacks.json")
        typer.echo(json.dumps(facts))
        return
    print_summary(run.folder, console)
    if attacked:
        console.print()
        for sentence in run.attacks:
            console.print(sentence)
    console.print(f"Run directory: {run.folder}", soft_wrap=True)  # to be copied whole
    console.print(f"Report:        {page}", soft_wrap=True)
