"""``silotune audit``: look into an audit log, and find out whether it is whole. Works offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from silotune.terminal import terminal
from silotune.trust import audit
from silotune.trust.audit import ExportFormat
from silotune.trust.files import replace_file
from silotune.trust.identity import decode_signing_key

app = typer.Typer(
    no_args_is_help=True,
    help="""Look into the audit log of a site or a coordinator.

    Each line carries the hash of the line before it, and each round the two sides sign each other's
    newest line. So nothing can be changed, removed or put in afterwards without being found here. No
    connection is needed: the file is enough, and the other side's file for comparison.
    """,
)

Place = Annotated[
    Path,
    typer.Argument(exists=True, help="The log's file, or the state folder that holds audit.jsonl."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Kind = Annotated[str, typer.Option(help="Only lines of this kind, e.g. approved.")]
Run = Annotated[str, typer.Option(help="Only lines about this run.")]
Since = Annotated[str, typer.Option(help="Only from this time on, ISO 8601 in UTC.")]
Until = Annotated[str, typer.Option(help="Only up to this time, ISO 8601 in UTC.")]


@app.command()
def verify(
    place: Place,
    against: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="The other side's log (the coordinator's for a site's, one site's for the "
            "coordinator's): every head it signed must be here.",
        ),
    ] = None,
    key: Annotated[
        str, typer.Option(help="The other side's public key (base64); no other may have signed.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Check every line's hash, the head file and every counter-signature; exit 40 if one is wrong.

    With --against it is also checked that neither side has lost or changed what the other signed.
    """
    log = audit.open_log(place)
    head = log.verify(trusted=decode_signing_key(key) if key else None)
    shared = audit.compare(log, audit.open_log(against)) if against else None
    found = {"path": str(log.path), "owner": log.owner, "lines": head.seq, "head": head.hash}
    if as_json:
        typer.echo(json.dumps({**found, "intact": True, "signed_by_the_other_side": shared}))
        return
    typer.echo(f"Intact: {head.seq} lines of {log.owner}, head {head.hash}")
    if shared is not None:
        typer.echo(f"The other side has signed {shared} heads of it, and all of them are here.")


@app.command()
def show(
    place: Place,
    *,
    kind: Kind = "",
    run: Run = "",
    since: Since = "",
    until: Until = "",
    last: Annotated[int, typer.Option(help="So many of the newest lines; 0 for all.")] = 40,
    as_json: AsJson = False,
) -> None:
    """Show what happened, oldest first."""
    log = audit.open_log(place)
    lines = audit.select(log.lines(), kind=kind, run=run, since=since, until=until)[-last:]
    if as_json:
        typer.echo(json.dumps([line.as_dict() for line in lines], indent=2))
        return
    table = Table("line", "time (UTC)", "what", "particulars", box=None)
    for line in lines:
        told = {k: v for k, v in line.fields.items() if k not in {"signature", "key", "log_hash"}}
        particulars = ", ".join(f"{name} {value}" for name, value in told.items())
        table.add_row(str(line.seq), line.time[:19], line.kind, particulars)
    terminal().print(table)


@app.command()
def export(
    place: Place,
    *,
    form: Annotated[
        ExportFormat, typer.Option("--format", help="jsonl keeps the hashes checkable.")
    ] = "jsonl",
    out: Annotated[
        Path | None, typer.Option(help="File to write (mode 0600); standard output if not given.")
    ] = None,
    kind: Kind = "",
    run: Run = "",
    since: Since = "",
    until: Until = "",
) -> None:
    """Write lines for auditors: as they are in the log, or as a table for a spreadsheet.

    The log is verified first. A whole export as jsonl is itself a log that `verify` checks, if the
    head file is put beside it.
    """
    log = audit.open_log(place)
    log.verify()
    lines = audit.select(log.lines(), kind=kind, run=run, since=since, until=until)
    text = audit.export(lines, form)
    if out is None:
        typer.echo(text, nl=False)
        return
    replace_file(out, text.encode())
    typer.echo(f"Wrote {len(lines)} lines to {out}")
