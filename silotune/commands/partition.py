"""`silotune partition`: divide one data file into simulated sites."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from silotune.terminal import terminal

if TYPE_CHECKING:
    from silotune.data.site import Role
    from silotune.simulation.partition import Partitioner


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
    from silotune.data.site import BudgetConfig
    from silotune.simulation.partition import partition_file

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
    from silotune.simulation.partition import ByColumn, DirichletLabels, Iid, QuantitySkew

    if by is How.COLUMN and not key:
        raise typer.BadParameter("--by column needs --key COLUMN", param_hint="--key")
    made: dict[How, Partitioner] = {
        How.COLUMN: ByColumn(key),
        How.IID: Iid(sites),
        How.LABELS: DirichletLabels(sites, alpha),
        How.QUANTITY: QuantitySkew(sites, alpha),
    }
    return made[by]
