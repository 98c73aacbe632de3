"""What ``silotune site`` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from silotune.terminal import headed, terminal

if TYPE_CHECKING:
    from silotune.federation.findings import Finding

_MARKS = {"ok": "green", "failed": "bold red", "skipped": "dim"}
_MOST_TENSORS = 6


_UNHEALTHY = 70


def tell_findings(findings: Sequence[Finding], *, as_json: bool) -> None:
    """A doctor's findings, then the remedies; exits with 70 if a check failed."""
    failed = [finding for finding in findings if finding.state == "failed"]
    if as_json:
        rows = [vars(finding) for finding in findings]
        typer.echo(json.dumps({"healthy": not failed, "findings": rows}, indent=2))
    else:
        _print_findings(findings, terminal())
    if failed:
        raise typer.Exit(_UNHEALTHY)


def _print_findings(findings: Sequence[Finding], console: Console) -> None:
    table = Table("check", "", "found", box=None)
    for finding in findings:
        code = f"{finding.code} " if finding.code else ""
        table.add_row(
            finding.check, Text(finding.state, _MARKS[finding.state]), code + finding.detail
        )
    console.print(table)
    failed = [finding for finding in findings if finding.state == "failed"]
    for finding in failed:
        console.print(f"{finding.code}  Do: {finding.remedy}")
    console.print(
        Text("Everything is in place.", "green")
        if not failed
        else f"{len(failed)} to be corrected."
    )


def print_status(found: Mapping[str, Any], console: Console) -> None:
    """The daemon's state in a few lines."""
    since = f"for {found['seconds']:.0f} s"
    link = {"online": "online", "waiting": "waiting", "connecting": "connecting"}[found["link"]]
    console.print(headed(found["site"], f"in federation {found['federation']}"))
    console.print(f"  Coordinator  {found['coordinator']}, {link} {since}")
    if found["trouble"]:
        console.print(f"  Books        not the newest (ST-807): {found['trouble']}")
    if found["reason"]:
        console.print(f"  Because      {found['reason']}")
    work = found["work"] or (
        "nothing, it is paused" if found["paused"] else "nothing at the moment"
    )
    console.print(f"  Works on     {work}")
    console.print(f"  Answered     {found['answered']}, refused {found['refused']}")
    console.print(
        f"  Certificate  {found['certificate_days']:.0f} more days; roster version "
        f"{found['roster']}; process {found['pid']}",
    )
    for sentence in found.get("failures", []):
        console.print(headed("Failed", f"     {sentence}", style="red", indent=2))
    if found["proposed"]:
        console.print(f"  {found['proposed']} plans wait for you: silotune site plans")


def print_proposal(found: Mapping[str, Any], console: Console) -> None:
    """One proposal, from what it is to what it changes."""
    console.print("\n", headed(found["run"], found["state"]), sep="")
    console.print(f"  Plan {found['name']}, SHA-256 {found['plan_sha256']}")
    when = datetime.fromtimestamp(found["proposed_at"]).astimezone()
    console.print(
        f"  Proposed {when:%Y-%m-%d %H:%M} by the coordinator, signed with the federation's key "
        f"{found['signed_by'][:12]}…",
    )
    if found["reason"]:
        console.print(f"  Reason: {found['reason']}")
    for heading, sentence in found["words"]:
        console.print(headed(f"{heading}.", sentence, indent=2))
    _print_leaves(found["leaves"], console)
    _print_spending(found["spending"], console)
    for sentence in found.get("records", []):
        console.print(headed("Records.", f"{sentence}.", style="yellow", indent=2))
    if found["problem"]:
        console.print(headed("Problem.", found["problem"], style="bold red", indent=2))
    _print_verdict(found["verdict"], console)
    _print_changes(found, console)
    if found["state"] == "proposed" and found["allowed"]:
        digest = found["plan_sha256"][:12]
        console.print(
            f"  silotune site approve {digest}   or   silotune site reject {digest} --reason '…'",
        )


def _print_leaves(leaves: Mapping[str, Any] | None, console: Console) -> None:
    if leaves is None:
        console.print(
            headed("What leaves.", "It can't be told without an allowed base model.", indent=2)
        )
        return
    tensors = leaves["tensors"]
    shown = ", ".join(f"{t['name']} {t['shape']}" for t in tensors[:_MOST_TENSORS])
    more = f" and {len(tensors) - _MOST_TENSORS} more" if len(tensors) > _MOST_TENSORS else ""
    sentence = (
        f"{leaves['bytes']:,} bytes a round at most, in {len(tensors)} tensors: {shown}{more}."
    )
    console.print(headed("What leaves.", sentence, indent=2))


def _print_spending(spending: Mapping[str, Any] | None, console: Console) -> None:
    if spending is None:
        return
    left = "" if spending["left"] is None else f", {spending['left']:.3f} of the budget left"
    sentence = f"{spending['now']:.3f} now, {spending['after']:.3f} with this run{left}."
    console.print(headed("Epsilon.", sentence, indent=2))


def _print_verdict(clauses: Sequence[Mapping[str, Any]], console: Console) -> None:
    if not clauses:
        return
    table = Table("policy", "", "because", box=None)
    for clause in clauses:
        mark = (
            Text("pass", "green")
            if clause["allowed"]
            else Text(f"refuse {clause['code']}", "bold red")
        )
        table.add_row(clause["clause"], mark, clause["reason"])
    console.print(table)


def _print_changes(found: Mapping[str, Any], console: Console) -> None:
    before = found["compared_with"]
    if before is None:
        console.print("  No plan was approved before.")
        return
    if not found["changes"]:
        console.print(f"  The same plan as that of run {before}, approved before.")
        return
    table = Table(f"changed since {before}", "approved then", "proposed now", box=None)
    for change in found["changes"]:
        table.add_row(change["key"], str(change["old"]), str(change["new"]))
    console.print(table)
