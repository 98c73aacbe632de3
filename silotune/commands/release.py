"""``silotune release``: the gate that an adapter passes before it leaves the consortium."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from silotune import __version__
from silotune.terminal import say, terminal

if TYPE_CHECKING:
    from silotune.release import Examined
    from silotune.rounds.run_directory import RunDirectory


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
        float,
        typer.Option(min=0.0, help="Bits of exposure that a canary may have (causal_lm)."),
    ] = 10.0,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check the signed release instead of making one."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
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
