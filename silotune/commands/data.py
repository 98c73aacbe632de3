"""`silotune demo`: data and plans to try silotune with.

`silotune partition`: divide one data file into simulated sites.
"""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from silotune.errors import DataError
from silotune.terminal import terminal

if TYPE_CHECKING:
    from silotune.data.partition import Partitioner
    from silotune.data.site import Role


app = typer.Typer(no_args_is_help=True, help="Write demo data, site folders and a plan.")


@app.callback()
def choose() -> None:
    """Write demo data, site folders and a plan."""


@app.command("hospitals")
def hospitals(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")] = Path("hospitals"),
    split: Annotated[
        str,
        typer.Option(
            help="Held-out data: 'code' at random, or 'category' for conditions never trained on."
        ),
    ] = "code",
    patients: Annotated[
        bool,
        typer.Option("--patients", help="Group records into made-up patients and protect those."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the folder if it is there.")
    ] = False,
) -> None:
    """Seven specialty hospitals, made of the descriptions of ICD-10-CM diagnosis codes.

    The task is to tell chronic conditions from acute ones. Chapters of the classification stand in
    for hospitals; there is no patient text in it.
    """
    from silotune.data.demo import write_hospitals

    if split not in {"code", "category"}:
        raise typer.BadParameter("use 'code' or 'category'", param_hint="--split")
    if folder.exists() and any(folder.iterdir()):
        if not force:
            raise DataError(f"{folder} is not empty", remedy="Give --force to replace it.")
        if not (folder / "plan.toml").is_file():
            raise DataError(f"{folder} is not a demo folder; it is left alone")
        shutil.rmtree(folder)
    write_hospitals(folder, split=split, patients=patients)  # type: ignore[arg-type]
    console = terminal()
    console.print(f"Seven hospitals and a plan are in {folder}. Next:")
    console.print(f"  silotune plan check {folder}/plan.toml")
    console.print(f"  silotune simulate {folder}/plan.toml --baselines")


class How(StrEnum):
    """Ways to divide."""

    COLUMN = "column"
    IID = "iid"
    LABELS = "labels"
    QUANTITY = "quantity"


def partition(  # noqa: PLR0917 - one a command-line option
    source: Annotated[Path, typer.Argument(help="A .csv, .jsonl or .parquet file.")],
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
    from silotune.data.site import Role

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
