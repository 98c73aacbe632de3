"""``silotune ledger``, ``certificate`` and ``audit``: look into what is kept, and check it, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from silotune.commands.folder import AsJson
from silotune.percents import said_percent
from silotune.privacy.ledger import open_ledger
from silotune.privacy.ledger_view import dataset_rows, run_rows
from silotune.terminal import headed, terminal
from silotune.trust import audit
from silotune.trust.audit import ExportFormat
from silotune.trust.files import replace_file
from silotune.trust.identity import decode_signing_key

if TYPE_CHECKING:
    from silotune.privacy.certificate import Measured, Verified

Out = Annotated[
    Path | None, typer.Option(help="File to write (mode 0600); standard output if not given.")
]


def _write(text: str, out: Path | None, what: str) -> None:
    if out is None:
        typer.echo(text, nl=False)
        return
    replace_file(out, text.encode())
    typer.echo(f"Wrote {what} to {out}")


ledger = typer.Typer(
    no_args_is_help=True,
    help="""Look into a site's privacy ledger.

    The ledger lists every differentially private release that ever left the site, as events; the
    epsilon shown is computed from them when you ask, by tight composition. Nothing can be edited.
    """,
)

LedgerPlace = Annotated[
    Path,
    typer.Argument(
        exists=True,
        help="The ledger's file, or the folder with the site's state (runs/NAME/sites/SITE).",
    ),
]

_DATASETS = {
    "dataset": "dataset",
    "spent ε": "epsilon_spent",
    "committed ε": "epsilon_committed",
    "budget ε": "epsilon_budget",
    "left ε": "left",
    "δ": "delta",
    "releases": "releases",
}
_RUNS = {
    "run": "run",
    "dataset": "dataset",
    "state": "state",
    "releases": "releases",
    "spent ε": "epsilon",
    "reserved ε": "epsilon_reserved",
    "plan": "plan_sha256",
}


@ledger.command("show")
def show_ledger(place: LedgerPlace, as_json: AsJson = False) -> None:
    """Show what is spent, reserved and left, by dataset and by run.

    "spent" is what was released; "committed" adds what running trainings may still release. Their
    epsilons don't simply add up: composition is tighter than the sum.
    """
    found = open_ledger(place)
    datasets, runs = dataset_rows(found), run_rows(found)
    if as_json:
        typer.echo(json.dumps({"datasets": datasets, "runs": runs}, indent=2))
        return
    console = terminal()
    if not datasets:
        console.print("This ledger is empty: nothing was ever reserved or released.")
        return
    console.print(_table("Datasets", _DATASETS, datasets), _table("Runs", _RUNS, runs))


@ledger.command("verify")
def verify_ledger(place: LedgerPlace, as_json: AsJson = False) -> None:
    """Check every row's hash, the head file and the counter-signed head; exit 40 if one is wrong.

    A truncated, edited or rolled-back ledger is found here, and also each time a site opens it:
    training is refused until the newest ledger and head are restored from backup.
    """
    found = open_ledger(place)
    head = found.verify()
    if as_json:
        told = {"path": str(found.path), "rows": head.seq, "head": head.hash, "intact": True}
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(f"Intact: {head.seq} rows, head {head.hash}")


@ledger.command("export")
def export_ledger(place: LedgerPlace, out: Out = None) -> None:
    """Write every row as JSON lines, oldest first, hashes included, for auditors.

    Each row's hash is the SHA-256 of its other columns as JSON with sorted keys and no white space.
    """
    rows = open_ledger(place).rows()
    text = "".join(json.dumps(row.as_dict(), sort_keys=True) + "\n" for row in rows)
    _write(text, out, f"{len(rows)} rows")


def _table(title: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_cell(key, row[key]) for key in columns.values()))
    return table


def _cell(key: str, value: object) -> str:
    if key == "plan_sha256":
        return str(value)[:12]
    if key == "delta":
        return f"{value:g}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


certificates = typer.Typer(
    no_args_is_help=True,
    help="""Check privacy certificates.

    At the end of a run each site signs a certificate: the privacy unit, epsilon and delta, and the
    events they follow from. Anybody can check one, offline, with this command alone.
    """,
)


@certificates.callback()
def _group() -> None:
    """Keep `verify` a command of its own while it is the only one."""


@certificates.command("verify")
def verify_certificate(
    path: Annotated[Path, typer.Argument(exists=True, help="The certificate.json of a site.")],
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            metavar="SHA256",
            help="Fingerprint of the site's key, from a source other than this file.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the signature and compute epsilon again from the events; exit 40 if they disagree.

    Without --key this shows that nothing was changed after signing, not who signed: compare the
    fingerprint with the one the site tells you.
    """
    from silotune.privacy import certificate

    verified = certificate.verify(path, key_sha256=key)
    if as_json:
        shown = {
            "valid": True,
            "epsilon": verified.epsilon,
            "key_sha256": verified.key_sha256,
            "key_known": key is not None,
            "certificate": verified.body.model_dump(mode="json"),
        }
        typer.echo(json.dumps(shown, indent=2))
        return
    console = terminal()
    console.print(headed("Valid.", f"{verified.body.statement}."))
    table = Table(show_header=False)
    for name, value in _rows(verified).items():
        table.add_row(name, value)
    console.print(table)
    if key is None:
        console.print("Compare the key's fingerprint with the one the site tells you.")


def _rows(verified: Verified) -> dict[str, str]:
    body = verified.body
    return {
        "site": body.site,
        "run": body.run,
        "dataset": body.dataset,
        "unit": f"{body.unit} ({body.adjacency_in_words})",
        "epsilon, recomputed": f"{verified.epsilon:.6f} at delta = {body.delta:g}",
        "mechanisms": "\n".join(
            f"{m.times} x Gaussian, sigma {m.sigma:.4f}, rate {m.rate:.4g}" for m in body.mechanisms
        ),
        "epsilon against": "\n".join(f"{to}: {epsilon:.4f}" for to, epsilon in body.exposed_to),
        "measured": _measured(body.measured),
        "clipping": ", ".join(f"{name} {norm:g}" for name, norm in body.clips.items()),
        "noise": body.noise_in_words,
        "accountant": body.accountant_in_words,
        "plan": body.plan_sha256,
        "base model": body.model_sha256 or "none",
        "ledger": f"row {body.ledger_seq}, {body.ledger_head}",
        "signed": f"{body.time} by silotune {body.code_version}",
        "key": verified.key_sha256,
    }


def _measured(measured: Measured | None) -> str:
    """What attacks reached, beside what is proven."""
    if measured is None:
        return "no attack was tried"
    bounds = {"one step": measured.audit, "the adapter": measured.membership}
    lines = [
        f"{name}: at least {bound.lower_bound:.2f} of {bound.claimed:.2f}, {bound.canaries} canaries"
        for name, bound in bounds.items()
        if bound is not None
    ]
    return "\n".join(
        [*lines, f"at {said_percent(measured.confidence)} confidence; a low bound proves nothing"]
    )


audits = typer.Typer(
    no_args_is_help=True,
    help="""Look into the audit log of a site or a coordinator.

    Each line carries the hash of the line before it, and each round the two sides sign each other's
    newest line. So nothing can be changed, removed or put in afterwards without being found here. No
    connection is needed: the file is enough, and the other side's file for comparison.
    """,
)

AuditPlace = Annotated[
    Path,
    typer.Argument(exists=True, help="The log's file, or the state folder that holds audit.jsonl."),
]
Kind = Annotated[str, typer.Option(help="Only lines of this kind, e.g. approved.")]
Run = Annotated[str, typer.Option(help="Only lines about this run.")]
Since = Annotated[str, typer.Option(help="Only from this time on, ISO 8601 in UTC.")]
Until = Annotated[str, typer.Option(help="Only up to this time, ISO 8601 in UTC.")]


@audits.command("verify")
def verify_audit(
    place: AuditPlace,
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


@audits.command("show")
def show_audit(
    place: AuditPlace,
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


@audits.command("export")
def export_audit(
    place: AuditPlace,
    *,
    form: Annotated[
        ExportFormat, typer.Option("--format", help="jsonl keeps the hashes checkable.")
    ] = "jsonl",
    out: Out = None,
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
    _write(audit.export(lines, form), out, f"{len(lines)} lines")
