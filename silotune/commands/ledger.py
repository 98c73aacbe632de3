"""``silotune ledger``: what a site has spent, and whether its ledger is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from silotune.privacy import spent
from silotune.terminal import terminal
from silotune.trust.files import replace_file

app = typer.Typer(
    no_args_is_help=True,
    help="""Look into a site's privacy ledger.

    The ledger lists every differentially private release that ever left the site, as events; the
    epsilon shown is computed from them when you ask, by tight composition. Nothing can be edited.
    """,
)

Place = Annotated[
    Path,
    typer.Argument(
        exists=True,
        help="The ledger's file, or the folder with the site's state (runs/NAME/sites/SITE).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def show(place: Place, as_json: AsJson = False) -> None:
    """Show what is spent, reserved and left, by dataset and by run.

    "spent" is what was released; "committed" adds what running trainings may still release. Their
    epsilons don't simply add up: composition is tighter than the sum.
    """
    ledger = spent.open_ledger(place)
    datasets, runs = spent.dataset_rows(ledger), spent.run_rows(ledger)
    if as_json:
        typer.echo(json.dumps({"datasets": datasets, "runs": runs}, indent=2))
        return
    console = terminal()
    if not datasets:
        console.print("This ledger is empty: nothing was ever reserved or released.")
        return
    console.print(
        _table(
            "Datasets",
            {
                "dataset": "dataset",
                "spent ε": "epsilon_spent",
                "committed ε": "epsilon_committed",
                "budget ε": "epsilon_budget",
                "left ε": "left",
                "δ": "delta",
                "releases": "releases",
            },
            datasets,
        ),
        _table(
            "Runs",
            {
                "run": "run",
                "dataset": "dataset",
                "state": "state",
                "releases": "releases",
                "spent ε": "epsilon",
                "reserved ε": "epsilon_reserved",
                "plan": "plan_sha256",
            },
            runs,
        ),
    )


@app.command()
def verify(place: Place, as_json: AsJson = False) -> None:
    """Check every row's hash, the head file and the counter-signed head; exit 40 if one is wrong.

    A truncated, edited or rolled-back ledger is found here, and also each time a site opens it:
    training is refused until the newest ledger and head are restored from backup.
    """
    result = spent.verification(spent.open_ledger(place))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(f"Intact: {result['rows']} rows, head {result['head']}")


@app.command()
def export(
    place: Place,
    out: Annotated[
        Path | None, typer.Option(help="File to write (mode 0600); standard output if not given.")
    ] = None,
) -> None:
    """Write every row as JSON lines, oldest first, hashes included, for auditors.

    Each row's hash is the SHA-256 of its other columns as JSON with sorted keys and no white space.
    """
    rows = spent.entries(spent.open_ledger(place))
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    if out is None:
        typer.echo(text, nl=False)
        return
    replace_file(out, text.encode())
    typer.echo(f"Wrote {len(rows)} rows to {out}")


def _table(title: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in columns:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(_cell(key, row[key]) for key in columns.values()))
    return table


def _cell(key: str, value: object) -> str:
    if key == "plan_sha256":
        return str(value)[:12]
    if key == "delta":
        return f"{value:g}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
