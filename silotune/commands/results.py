"""What is done with a run: `silotune report`, `dashboard`, `export` and `release`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from silotune.commands.folder import AsJson
from silotune.terminal import say, terminal
from silotune.version import __version__

if TYPE_CHECKING:
    from silotune.release import Examined
    from silotune.rounds.run_directory import RunDirectory


def report(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Another run of the same plan, for the scores' spread; repeatable."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the run's figures as one JSON object instead.")
    ] = False,
) -> None:
    """Write report.html and its pictures into a run directory, also while the run goes on."""
    from silotune.api.run import Run

    found, others = Run(run), [Run(other) for other in beside or []]
    typer.echo(json.dumps(found.to_json(beside=others)) if as_json else found.report(beside=others))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two run directories or more.")],
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: the plan settings in which they differ, and what came of them.

    Scores are of the federated model on held-out test data; epsilon is the largest that a site spent.
    """
    from silotune.api.comparison import compare as side_by_side

    found = side_by_side(*runs)
    if as_json:
        shown = {"score": found.score, "settings": found.settings, "runs": found.rows}
        typer.echo(json.dumps(shown))
        return
    differing = {key: list(map(_cell, values)) for key, values in found.settings.items()}
    columns = dict.fromkeys(key for row in found.rows for key in row)
    results = {key: [_cell(row.get(key)) for row in found.rows] for key in columns}
    # A run a column: plans may differ in many keys, and the runs are few.
    table = Table("", *(str(row["run"]) for row in found.rows), box=None)
    for key, cells in ({**differing, **results}).items():
        if key != "run":
            table.add_row(key, *cells)
    terminal().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def dashboard(
    runs: Annotated[
        Path, typer.Argument(help="A run directory, or a folder that holds several.")
    ] = Path("runs"),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")
    ] = 0,
) -> None:
    """Show simulations in a browser, also while they go on.

    Serves this machine alone (127.0.0.1) until Ctrl-C, and lets in only who has the printed link.
    """
    from starlette.types import ASGIApp

    from silotune.dashboard.page_guard import Access, serve_here
    from silotune.dashboard.pages import Content, build
    from silotune.events.source import RunDirectories

    source = RunDirectories(runs)

    def application(access: Access) -> ASGIApp:
        return build(Content(title=runs.resolve().name, source=source), access)

    serve_here(application, port=port, role="viewer", said=lambda url: typer.echo(f"Open {url}"))


class Tool(StrEnum):
    """Where the curves go."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"


def export(
    run: Annotated[
        str, typer.Argument(help="A run directory; with --credentials, a run of the coordinator.")
    ],
    to: Annotated[Tool, typer.Option(help="The tool that will read them.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    credentials: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the credentials of a person at the coordinator (`silotune admin`)."
        ),
    ] = None,
) -> None:
    """Write a run's curves for another tool: released metrics, epsilon, seconds, bytes.

    Needs `pip install 'silotune[tensorboard]'` or `'silotune[mlflow]'`.
    """
    from silotune import export as curves

    if credentials is None:
        found = curves.of_directory(Path(run))
    else:
        from silotune.server.admin.client import ControlClient

        client = ControlClient(credentials)
        try:
            found = curves.of_coordinator(client, run)
        finally:
            client.close()
    if to is Tool.TENSORBOARD:
        shown = f"tensorboard --logdir {curves.write_tensorboard(found, out).parent}"
    else:
        store = curves.write_mlflow(found, out).resolve()
        shown = f"mlflow ui --backend-store-uri sqlite:///{store}"
    points = sum(map(len, found.curves.values()))
    typer.echo(f"Wrote {len(found.curves)} curves, {points} points. Look at them: {shown}")


def release(  # noqa: PLR0917 - one a command-line option
    run: Annotated[Path, typer.Argument(help="Run directory of a finished run.")],
    person: Annotated[
        str | None, typer.Option("--by", metavar="NAME", help="Who signs: a person's full name.")
    ] = None,
    role: Annotated[
        str | None, typer.Option(help="In which role, e.g. 'output checker'. Needed with --by.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="That person's key file; made (mode 0600) if it isn't there."),
    ] = None,
    most_exposure: Annotated[
        float, typer.Option(min=0.0, help="Bits of exposure that a canary may have (causal_lm).")
    ] = 10.0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the signed release instead of making one.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a finished run's adapter against every control, and have a named person sign.

    Without --by nothing is signed: the table says what passes, who holds each control, and which numbers
    were compared. Exit 40 if one is not passed; none can be waived. docs/release.md explains them.
    """
    from silotune.errors import ReleaseRefused
    from silotune.release import examine
    from silotune.rounds.run_directory import RunDirectory

    _require_whole(person, role, key, verify=verify)
    directory = RunDirectory.open(run)
    if verify:
        _verify(directory, as_json=as_json)
        return
    found = examine(directory, most_exposure=most_exposure)
    signed = None
    if person and role and key and not found.failed:
        signed = _sign(directory, found, person=person, role=role, key=key)
    _show(found, signed, as_json=as_json)
    if found.failed:
        raise ReleaseRefused(f"not passed: {', '.join(found.failed)}")


def _require_whole(person: str | None, role: str | None, key: Path | None, *, verify: bool) -> None:
    given = [value is not None for value in (person, role, key)]
    if verify and any(given):
        raise typer.BadParameter("--verify signs nothing; leave --by, --role and --key out")
    if any(given) and not all(given):
        raise typer.BadParameter("signing takes --by, --role and --key, all three")


def _sign(
    directory: RunDirectory, found: Examined, *, person: str, role: str, key: Path
) -> tuple[Path, str]:
    from silotune.release import RELEASE_FILE, ReleaseControl, Statement, sign
    from silotune.trust.identity import fingerprint, load_or_create

    private = load_or_create(key)
    statement = Statement(
        run=found.run,
        plan_sha256=found.plan_sha256,
        files=dict(found.files),
        certificates=dict(found.certificates),
        controls=(*found.controls, ReleaseControl(name="signature", held_by="person", passed=True)),
        person=person,
        role=role,
        code_version=__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    path = directory.root / RELEASE_FILE
    sign(statement, path, key=private)
    return path, fingerprint(private.public_key())


def _show(found: Examined, signed: tuple[Path, str] | None, *, as_json: bool) -> None:
    from silotune import release as words

    if as_json:
        shown = {
            "run": found.run,
            "passed": not found.failed,
            "controls": [control.model_dump() for control in found.controls],
            "signed": str(signed[0]) if signed else None,
            "key_sha256": signed[1] if signed else None,
        }
        typer.echo(json.dumps(shown))
        return
    table = Table("control", "held by", "asks", "found", "")
    for control in found.controls:
        style = {True: "green", False: "bold red", None: "dim"}[control.passed]
        table.add_row(
            control.name,
            words.holder(control),
            words.asks(control),
            words.figures(control),
            Text(words.verdict(control), style=style),
        )
    terminal().print(table)
    if signed:
        say(f"Signed: {signed[0]}. The key's fingerprint, for others to compare: {signed[1]}")
    elif not found.failed:
        say("Every control is passed. To sign: --by NAME --role ROLE --key FILE")


def _verify(directory: RunDirectory, *, as_json: bool) -> None:
    """Whether the adapter and the certificates here are those that were signed."""
    from silotune.errors import ReleaseInvalid
    from silotune.release import RELEASE_FILE, examine, read

    statement, signer = read(directory.root / RELEASE_FILE)
    now = examine(directory)
    signed = (statement.files, statement.certificates, statement.plan_sha256)
    if signed != (now.files, now.certificates, now.plan_sha256):
        changed = [
            name
            for name in sorted({*statement.files, *now.files})
            if statement.files.get(name) != now.files.get(name)
        ]
        raise ReleaseInvalid(
            f"changed since it was signed: {', '.join(changed) or 'a certificate or the plan'}"
        )
    if as_json:
        typer.echo(json.dumps({"valid": True, "key_sha256": signer, **statement.model_dump()}))
        return
    say(
        f"Valid: signed by {statement.person} ({statement.role}) on {statement.time}. "
        f"Compare the key's fingerprint: {signer}"
    )
