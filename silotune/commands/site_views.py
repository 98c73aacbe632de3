"""What ``silotune site`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from silotune.client.doctor import Finding

_MARKS = {"ok": "[green]ok[/]", "failed": "[bold red]failed[/]", "skipped": "[dim]skipped[/]"}
_MOST_TENSORS = 6


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """The doctor's findings, then the remedies."""
    table = Table("check", "", "found", box=None)
    for finding in findings:
        code = f"{finding.code} " if finding.code else ""
        table.add_row(finding.check, _MARKS[finding.state], escape(code + finding.detail))
    console.print(table)
    failed = [finding for finding in findings if finding.state == "failed"]
    for finding in failed:
        console.print(f"{finding.code}  Do: {finding.remedy}", markup=False, highlight=False)
    console.print(
        "[green]Everything is in place.[/]" if not failed else f"{len(failed)} to be corrected."
    )


def print_status(found: Mapping[str, Any], console: Console) -> None:
    """The daemon's state in a few lines."""
    since = f"for {found['seconds']:.0f} s"
    link = {"online": "online", "waiting": "waiting", "connecting": "connecting"}[found["link"]]
    console.print(f"[bold]{found['site']}[/] in federation {found['federation']}")
    console.print(f"  Coordinator  {found['coordinator']}, {link} {since}", highlight=False)
    if found["reason"]:
        console.print(f"  Because      {escape(found['reason'])}", highlight=False)
    work = found["work"] or (
        "nothing, it is paused" if found["paused"] else "nothing at the moment"
    )
    console.print(f"  Works on     {escape(work)}", highlight=False)
    console.print(
        f"  Answered     {found['answered']}, refused {found['refused']}", highlight=False
    )
    console.print(
        f"  Certificate  {found['certificate_days']:.0f} more days; roster version "
        f"{found['roster']}; process {found['pid']}",
        highlight=False,
    )
    if found["proposed"]:
        console.print(f"  {found['proposed']} plans wait for you: silotune site plans")


def print_proposal(found: Mapping[str, Any], console: Console) -> None:
    """One proposal, from what it is to what it changes."""
    console.print(f"\n[bold]{escape(found['run'])}[/]  {found['state']}", highlight=False)
    console.print(f"  Plan {found['name']}, SHA-256 {found['plan_sha256']}", highlight=False)
    when = datetime.fromtimestamp(found["proposed_at"]).astimezone()
    console.print(
        f"  Proposed {when:%Y-%m-%d %H:%M} by the coordinator, signed with the federation's key "
        f"{found['signed_by'][:12]}…",
        highlight=False,
    )
    if found["reason"]:
        console.print(f"  Reason: {escape(found['reason'])}", highlight=False)
    for heading, sentence in found["words"]:
        console.print(f"  [bold]{heading}.[/] {escape(sentence)}", highlight=False)
    _print_leaves(found["leaves"], console)
    _print_spending(found["spending"], console)
    if found["problem"]:
        console.print(f"  [bold red]Problem.[/] {escape(found['problem'])}", highlight=False)
    _print_verdict(found["verdict"], console)
    _print_changes(found, console)
    if found["state"] == "proposed" and found["allowed"]:
        digest = found["plan_sha256"][:12]
        console.print(
            f"  silotune site approve {digest}   or   silotune site reject {digest} --reason '…'",
            highlight=False,
        )


def _print_leaves(leaves: Mapping[str, Any] | None, console: Console) -> None:
    if leaves is None:
        console.print("  [bold]What leaves.[/] It can't be told without an allowed base model.")
        return
    tensors = leaves["tensors"]
    shown = ", ".join(f"{t['name']} {t['shape']}" for t in tensors[:_MOST_TENSORS])
    more = f" and {len(tensors) - _MOST_TENSORS} more" if len(tensors) > _MOST_TENSORS else ""
    console.print(
        f"  [bold]What leaves.[/] {leaves['bytes']:,} bytes a round at most, in {len(tensors)} "
        f"tensors: {escape(shown)}{more}.",
        highlight=False,
    )


def _print_spending(spending: Mapping[str, Any] | None, console: Console) -> None:
    if spending is None:
        return
    left = "" if spending["left"] is None else f", {spending['left']:.3f} of the budget left"
    console.print(
        f"  [bold]Epsilon.[/] {spending['now']:.3f} now, {spending['after']:.3f} with this run{left}.",
        highlight=False,
    )


def _print_verdict(clauses: Sequence[Mapping[str, Any]], console: Console) -> None:
    if not clauses:
        return
    table = Table("policy", "", "because", box=None)
    for clause in clauses:
        mark = "[green]pass[/]" if clause["allowed"] else f"[bold red]refuse {clause['code']}[/]"
        table.add_row(clause["clause"], mark, escape(clause["reason"]))
    console.print(table)


def _print_changes(found: Mapping[str, Any], console: Console) -> None:
    before = found["compared_with"]
    if before is None:
        console.print("  No plan was approved before.")
        return
    if not found["changes"]:
        console.print(f"  The same plan as that of run {before}, approved before.", highlight=False)
        return
    table = Table(f"changed since {before}", "approved then", "proposed now", box=None)
    for change in found["changes"]:
        table.add_row(change["key"], escape(str(change["old"])), escape(str(change["new"])))
    console.print(table)
