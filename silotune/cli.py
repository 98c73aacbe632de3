"""The command line: parse, call, print."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from silotune.commands import (
    admin,
    books,
    coordinator,
    data,
    demos,
    evaluate,
    explain,
    plan,
    predict,
    reference,
    results,
    serving,
    simulate,
    site,
    tune,
)
from silotune.errors import SilotuneError
from silotune.terminal import LiteralGroup, terminal
from silotune.version import __version__

app = typer.Typer(
    cls=LiteralGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune one language model across organisations that may not pool their records.",
    epilog="Start with: silotune demo hospitals ./hospitals, then silotune simulate hospitals/plan.toml",
)
app.add_typer(demos.demo, name="demo")
app.command("partition")(simulate.partition)
app.add_typer(data.app, name="data")
app.add_typer(plan.app, name="plan")
app.command("simulate")(simulate.simulate)
app.command("tune")(tune.tune)
app.add_typer(coordinator.app, name="coordinator")
app.command("report")(results.report)
app.command("compare")(results.compare)
app.add_typer(serving.exports, name="export")
app.command("release")(results.release)
app.command("dashboard")(results.dashboard)
app.command("predict")(predict.predict)
app.command("serve")(serving.serve)
app.command("evaluate")(evaluate.evaluate)
app.command("explain")(explain.explain)
app.add_typer(site.app, name="site")
app.add_typer(books.ledger, name="ledger")
app.add_typer(books.certificates, name="certificate")
app.add_typer(books.audits, name="audit")
app.add_typer(admin.app, name="admin")
app.command("errors")(reference.errors)
app.command("events")(reference.events)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"silotune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and library logs.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""
    del version
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING)
    if not debug:
        for noisy in ("flwr", "opacus", "transformers"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


def show_error(error: SilotuneError, console: Console) -> None:
    """Print what happened, why, and what to do."""
    # A terminal breaks lines between words here; a log keeps them whole.
    whole = not console.is_terminal
    console.print(
        Text.assemble((error.code, "bold red"), " ", (error.title, "bold")), soft_wrap=whole
    )
    for line in (error.detail, f"Why: {error.cause}", f"Do:  {error.remedy}"):
        console.print(line, soft_wrap=whole)


def main() -> None:
    """Entry point of the `silotune` console script."""
    debug = "--debug" in sys.argv[1:]
    try:
        app()
    except SilotuneError as error:
        if debug:
            raise
        show_error(error, terminal(stderr=True))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        terminal(stderr=True).print("Interrupted. Nothing finished is lost.")
        sys.exit(130)


if __name__ == "__main__":
    main()
