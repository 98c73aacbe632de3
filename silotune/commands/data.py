"""``silotune data``: look at a site's records before anybody trains on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from silotune.commands.folder import AsJson
from silotune.commands.plan import Overrides, parsed
from silotune.plan.plan import Plan
from silotune.terminal import headed, say, terminal

if TYPE_CHECKING:
    from silotune.api.site import Site
    from silotune.data.examination import Examination

app = typer.Typer(
    no_args_is_help=True, help="Look at a site's records before anybody trains on them."
)

_STYLES = {"wrong": "bold red", "warning": "yellow", "note": "dim"}
_WRONG = 70
_AT_ONCE = 250  # records that a bar moves by


@app.command("check")
def check(  # noqa: PLR0917 - one a command-line option
    site: Annotated[Path, typer.Argument(help="The site's site.toml.", show_default=False)],
    plan: Annotated[
        Path | None, typer.Option(help="Read the records as this plan's run would.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="One dataset alone; all of site.toml when absent.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--html", help="Write a page with pictures to this file, mode 0600."),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(help="Folder of a spaCy model of your own: look for names, too, by Presidio."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 70 on warnings, too.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Look at the records on this machine: nothing of it is sent anywhere.

    Counts rows, units, records of a unit, labels and lengths; exact and near duplicates within and
    across the held-out split, and what they are worth to a score; texts that look like identifiers:
    e-mail, phone, IBAN, card and national numbers with their check digits, dates of birth, record
    numbers. No text is ever shown. With --plan, lengths are in tokens of its model, and labels and split
    are its own.

    Each remark has a level. "wrong": training would be in vain or not what site.toml says; the command
    exits with 70. "warning": scores or people suffer; with --strict it exits with 70, too. "note": worth
    knowing.
    Counts are exact: what this prints and writes is for the site's own people, and not for sharing.
    """
    from silotune.api.site import Site

    asked = None if plan is None else Plan.load(plan, parsed(overrides or []))
    found = _examined(Site(site), asked, dataset, names)
    if page is not None:
        from silotune.report.records_page import write_records_page

        write_records_page(page, found)
    if as_json:
        typer.echo(json.dumps(_plain(found)))
    else:
        for one in found:
            _print(one, terminal())
        if page is not None:
            say(f"The page is {page}; it is for this site's own people.")
    if any(one.worst == "wrong" or (strict and one.worst == "warning") for one in found):
        raise typer.Exit(_WRONG)


def _examined(
    site: Site, plan: Plan | None, dataset: str | None, model: Path | None
) -> Sequence[Examination]:
    if plan and plan.only_sums:
        raise typer.BadParameter(
            "it counts, and trains on nothing: leave it out, or give one that trains",
            param_hint="--plan",
        )
    names = [plan.data.dataset] if plan else [dataset] if dataset else list(site.config.datasets)
    if plan and dataset not in (None, plan.data.dataset):
        raise typer.BadParameter(f"the plan asks for {plan.data.dataset}", param_hint="--dataset")
    with _progress() as stage:
        return [site.look(name, plan=plan, names=model, stage=stage) for name in names]


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """What goes on, in a terminal: a bar a stage, gone at the end; nothing anywhere else."""
    console = terminal(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:

        def stage(title: str, steps: int) -> Callable[[], None]:
            for task in bars.task_ids:
                bars.remove_task(task)
            task, done = bars.add_task(title, total=max(steps, 1)), count(1)

            def advance() -> None:
                if next(done) % _AT_ONCE == 0:
                    bars.advance(task, _AT_ONCE)

            return advance

        yield stage


def _plain(found: Sequence[Examination]) -> dict[str, Any]:
    return {
        "site": found[0].site,
        "not_for_sharing": True,
        "datasets": [
            {
                **asdict(one),
                "worst": one.worst,
                "identifiers": [
                    {**asdict(seen), "likely": seen.likely} for seen in one.identifiers
                ],
            }
            for one in found
        ],
    }


def _print(found: Examination, console: Console) -> None:
    from silotune.report.records_page import facts_of, identifier_rows, label_rows

    read_as = f"as plan {found.plan} reads it" if found.plan else "with every label there is"
    console.print(headed(f"{found.site}, {found.dataset}", read_as))
    for heading, sentence in facts_of(found):
        console.print(headed(f"{heading}.", sentence, indent=2))
    for head, rows in (label_rows(found), identifier_rows(found)):
        if rows:
            table = Table(*head, box=None)
            for column in table.columns[1:]:
                column.justify = "right"
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)
    for remark in found.remarks:
        console.print(headed(f"{remark.level}:", remark.sentence, style=_STYLES[remark.level]))
        if remark.remedy:
            console.print(f"    Do: {remark.remedy}")
    if not found.remarks:
        console.print(Text("Nothing is remarkable.", "green"))
