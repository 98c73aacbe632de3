"""``silotune site``: join a federation, run the daemon, judge plans, look after it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from silotune.client.daemon.socket import ask
from silotune.client.errors import RunNotProposed, SiteNotEnrolled
from silotune.commands import folder
from silotune.commands.folder import AsJson
from silotune.data.site import SiteConfig, load_guarded
from silotune.logs import Format
from silotune.terminal import headed, terminal

if TYPE_CHECKING:
    from silotune.findings import Finding


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
        f"{found['roster']}; process {found['pid']}"
    )
    for sentence in found.get("failures", []):
        console.print(headed("Failed", f"     {sentence}", style="red", indent=2))
    _print_processes(found, console)
    _print_isolation(found["isolation"], console)
    if found["proposed"]:
        console.print(f"  {found['proposed']} plans wait for you: silotune site plans")


def _print_processes(found: Mapping[str, Any], console: Console) -> None:
    trainer, why = found.get("trainer"), found.get("reads_records", "")
    told = "none: it is started for a run"
    if trainer is not None:
        told = (
            f"process {trainer['pid']}, {trainer['memory_mb']:.0f} MB, for {trainer['seconds']:.0f} s; "
            f"asked last {trainer['idle']:.0f} s ago"
        )
    console.print(f"  Trainer      {told}")
    console.print(
        f"  Daemon       {f'could read records: {why}' if why else 'can not open a record'}"
    )


def _print_isolation(protections: Sequence[Mapping[str, Any]], console: Console) -> None:
    missing = [each for each in protections if not each["in_force"]]
    console.print(
        f"  Isolation    {len(protections) - len(missing)} of {len(protections)} protections are in "
        "force around what reads records" + (", without:" if missing else "")
    )
    for each in missing:
        console.print(f"               {each['name']}: {each['reason']}")


def print_proposal(found: Mapping[str, Any], console: Console) -> None:
    """One proposal, from what it is to what it changes."""
    console.print("\n", headed(found["run"], found["state"]), sep="")
    console.print(f"  Plan {found['name']}, SHA-256 {found['plan_sha256']}")
    when = datetime.fromtimestamp(found["proposed_at"]).astimezone()
    console.print(
        f"  Proposed {when:%Y-%m-%d %H:%M} by the coordinator, signed with the federation's key "
        f"{found['signed_by'][:12]}…"
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
            f"  silotune site approve {digest}   or   silotune site reject {digest} --reason '…'"
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


app = typer.Typer(
    no_args_is_help=True,
    help="""Run this organisation's part of a federation.

    In order: write site.toml (examples/site.toml explains every key), `join` with the code that the
    coordinator's operator sent, `doctor` to see that everything is in place, `start` the daemon. Plans
    that the coordinator proposes then show up in `plans`, where you approve or reject them.

    The daemon only connects outward; the other commands talk to it over a private Unix socket.
    """,
)

ConfigPath = Annotated[
    Path, typer.Option("--config", "-c", help="The site's site.toml.", show_default=True)
]

_CONFIG = Path("site.toml")
_LEAST_DIGITS = 4


@app.command()
def join(
    code: Annotated[str, typer.Argument(help="The invitation, as the operator sent it.")],
    config: ConfigPath = _CONFIG,
    wait: Annotated[
        float, typer.Option(help="Seconds to wait for the operator's approval.")
    ] = 86400.0,
    as_json: AsJson = False,
) -> None:
    """Join a federation with an invitation.

    Makes the site's keys here (they never leave this machine), checks that the coordinator is the one
    that invited, and asks to be let in. Six words appear: read them to the coordinator's operator,
    over the telephone say, who must see the same six. Interrupted, it goes on with the same code.
    """
    from silotune.client.daemon.enrolment import Joining

    console = terminal(stderr=as_json)
    joining = Joining(load_guarded(config), code)
    joining.ask()
    console.print("Read these six words to the coordinator's operator, who must see the same six:")
    console.print(Text(f"\n  {joining.words}\n", "bold"), soft_wrap=True)
    console.print("Waiting for the approval.")
    enrolment = joining.wait(seconds=wait)
    if enrolment is None:
        console.print("Not approved yet. Run the same command again to go on waiting.")
        raise typer.Exit(1)
    facts = enrolment.facts
    if as_json:
        typer.echo(facts.model_dump_json())
        return
    console.print(f"{facts.site} is now in federation {facts.federation}.")
    console.print("Next: silotune site doctor, then silotune site start.")


@app.command()
def doctor(config: ConfigPath = _CONFIG, as_json: AsJson = False) -> None:
    """Check everything a site needs; exit 70 if something is wrong.

    Looks at who may change site.toml and the state folder, at policy, keys, enrolment, name service,
    port, proxy, TLS, certificate, clock, disk, device, isolation of the process that reads records, base
    models, datasets, ledger and audit log. Each trouble has a code and a remedy.
    """
    from silotune.client.daemon.doctor import SiteDoctor

    tell_findings(SiteDoctor(SiteConfig.load(config)).examine(), as_json=as_json)


@app.command()
def start(
    config: ConfigPath = _CONFIG,
    log_format: Annotated[
        Format, typer.Option(help="text for people, json for machines.")
    ] = "text",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    grace: Annotated[
        float, typer.Option(help="Seconds that a step may go on after SIGTERM.")
    ] = 30.0,
) -> None:
    """Run the daemon until SIGTERM.

    It connects to the coordinator (through HTTPS_PROXY if that is set), works on approved plans one
    message at a time, and reconnects for ever; `status` says what it waits for. SIGTERM lets the step
    in progress finish; what is abandoned has released nothing.
    """
    from silotune.client.training.launcher import python_path

    load_guarded(config)
    # In this process's place, and under its id: the command line would stay in memory for months.
    os.environ["PYTHONPATH"] = python_path()
    daemon = [sys.executable, "-P", "-m", "silotune.client.daemon"]
    os.execv(sys.executable, [*daemon, str(config), log_format, log_level, str(grace)])  # noqa: S606


@app.command()
def status(config: ConfigPath = _CONFIG, as_json: AsJson = False) -> None:
    """Ask the running daemon how it is: its connection, its work, what it waits for."""
    found = ask(load_guarded(config).state_folder, "status")
    if as_json:
        typer.echo(json.dumps(found))
        return
    print_status(found, terminal())


@app.command()
def pause(config: ConfigPath = _CONFIG, as_json: AsJson = False) -> None:
    """Answer no more requests, from the next one on, until `resume`; a restart doesn't end it."""
    found = ask(load_guarded(config).state_folder, "pause")
    finishing = f" {found['work']} is still being finished." if found["work"] else ""
    _say(found, f"Paused.{finishing}", as_json)


@app.command()
def resume(config: ConfigPath = _CONFIG, as_json: AsJson = False) -> None:
    """Take part again after `pause`."""
    found = ask(load_guarded(config).state_folder, "resume")
    _say(found, "The site takes part again.", as_json)


@app.command()
def leave(
    config: ConfigPath = _CONFIG,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Leave the federation for good: the certificate is revoked, keys are removed, the daemon ends.

    The privacy ledger and the audit log stay: what was spent remains spent.
    """
    site = load_guarded(config)
    if not yes:
        typer.confirm(f"Shall {site.name} leave the federation for good?", abort=True)
    found = ask(site.state_folder, "leave")
    _say(found, f"{site.name} has left {found['left']}. Ledger and audit log were kept.", as_json)


@app.command()
def reseal(
    key_file: folder.KeyFile = None,
    passphrase_file: folder.PassphraseFile = None,
    passphrase_env: folder.PassphraseEnv = None,
    config: ConfigPath = _CONFIG,
    as_json: AsJson = False,
) -> None:
    """Change what opens the sealed files of the state: another key file, or a passphrase.

    For a stopped daemon. The sealed files stay as they are; only the key to them is wrapped anew. Then
    name the new secret under [at_rest] in site.toml and start: from that start on the old one opens
    nothing. Until then both do, so that no crash locks the state.
    """
    import os

    from silotune.client.daemon.books import hold_state
    from silotune.trust.audit import AUDIT_FILE, AuditLog
    from silotune.trust.vault import Vault

    site = load_guarded(config)
    state = site.state_folder
    if not state.is_dir():
        raise SiteNotEnrolled(f"there is no state folder {state}, so nothing is sealed yet")
    held = hold_state(state)
    try:
        folder.reseal(
            Vault(state, site.at_rest, base=site.folder),
            folder.at_rest_of(key_file, passphrase_file, passphrase_env),
            audit=AuditLog(state / AUDIT_FILE, owner=site.name),
            config=config,
            base=site.folder,
            as_json=as_json,
        )
    finally:
        os.close(held)


@app.command()
def restore(
    reason: Annotated[str, typer.Option(help="Why; for both audit logs.")],
    config: ConfigPath = _CONFIG,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put an older copy of ledger and audit log into use, after the newest was lost.

    Put the newest copy there is into the state folder first, or leave it empty of them; stop the daemon.
    Everything that may be missing is charged: what the coordinator's newest signature says was spent,
    and what runs under way had reserved, beyond the last row that it signed in the copy. That is never
    less than was really spent, and can be more. Both audit logs say that it was done, and why.
    """
    import getpass

    from silotune.client.daemon.books import restore as restored

    site = SiteConfig.load(config)
    if not yes:
        typer.confirm(
            f"Shall {site.name} go on with the books that lie in {site.state_folder} now, and be "
            "charged for all that may be missing in them?",
            abort=True,
        )
    done = restored(site, reason=reason, by=getpass.getuser())
    if as_json:
        typer.echo(json.dumps({"restored": [vars(entry) for entry in done]}))
        return
    for entry in done:
        typer.echo(
            f"{entry.dataset}: charged for what may be missing: epsilon {entry.charged:.4f}; "
            f"spent in all: {entry.spent:.4f} (delta {entry.delta:g})"
        )
    if not done:
        typer.echo("Nothing that was spent is missing.")
    typer.echo("The coordinator takes these books from now on. Next: silotune site start.")


@app.command()
def dashboard(
    config: ConfigPath = _CONFIG,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")
    ] = 0,
    decide: Annotated[
        bool, typer.Option("--decide", help="Let whoever has the link approve and reject plans.")
    ] = False,
) -> None:
    """Show in a browser what runs here, what has left, the budget, plans and the audit log.

    Serves this machine alone (127.0.0.1) until Ctrl-C, read-only unless --decide is given, and lets in
    only who has the printed link.
    """
    from functools import partial

    from silotune.client.daemon.page import build
    from silotune.dashboard.page_guard import serve_here

    application = partial(build, load_guarded(config))
    role: Literal["viewer", "operator"] = "operator" if decide else "viewer"
    serve_here(application, port=port, role=role, said=lambda url: typer.echo(f"Open {url}"))


@app.command()
def plans(
    run: Annotated[str, typer.Argument(help="A run, or the first digits of a plan's hash.")] = "",
    config: ConfigPath = _CONFIG,
    every: Annotated[bool, typer.Option("--all", help="Also runs that are over.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what the coordinator proposes, and what it would mean for this site.

    For each plan: its purpose, what leaves the site, the privacy in words, epsilon now and after it,
    the policy's verdict clause by clause, and the difference from the plan that was approved last. Of
    the one plan that RUN names also what it makes of this site's records, which are read for it.
    """
    from silotune.client.approvals import Approvals
    from silotune.client.proposal_view import describe, records_in_words

    site = load_guarded(config)
    approvals = Approvals(site.state_folder)
    entries = [
        entry
        for entry in approvals.entries()
        if (every or run or not entry.over)
        and (not run or entry.run == run or entry.plan.sha256.startswith(run))
    ]
    described = [describe(site, entry, approvals) for entry in entries]
    for found, entry in zip(described, entries, strict=True):
        # Reading a dataset takes time: for the plan that was asked for.
        found["records"] = records_in_words(site, entry.plan) if run else []
    if as_json:
        typer.echo(json.dumps({"plans": described}, indent=2))
        return
    console = terminal()
    if not described:
        console.print(
            "Nothing is proposed."
            if not run
            else f"No proposal fits {run}; --all shows runs that are over, too."
        )
    for found in described:
        print_proposal(found, console)


@app.command()
def approve(
    plan: Annotated[
        str, typer.Argument(help="The run, or the first 4 or more digits of the plan's hash.")
    ],
    config: ConfigPath = _CONFIG,
    as_json: AsJson = False,
) -> None:
    """Approve a proposed plan: the site signs the plan's hash, and takes part.

    A plan that the policy refuses can't be approved: change the policy first. An approval is for one
    run of exactly this plan; if the plan changes, it has to be approved again.
    """
    from silotune.client.approvals import Approvals
    from silotune.client.proposal_view import judge_proposal

    site, run = _proposed(config, plan)
    entry = Approvals(site.state_folder).find(run)
    if site.policy is not None:
        judge_proposal(site, entry).require()
    _decide(site, run, "approved", "", as_json)


@app.command()
def reject(
    plan: Annotated[
        str, typer.Argument(help="The run, or the first 4 or more digits of the plan's hash.")
    ],
    reason: Annotated[str, typer.Option(help="Told to the coordinator's operator.")],
    config: ConfigPath = _CONFIG,
    as_json: AsJson = False,
) -> None:
    """Reject a proposed plan, or one that was approved before; the reason is sent."""
    site, run = _proposed(config, plan)
    _decide(site, run, "rejected", reason, as_json)


def _proposed(config: Path, wanted: str) -> tuple[SiteConfig, str]:
    """The site and the one open run that a hash or name means."""
    from silotune.client.approvals import Approvals

    site = load_guarded(config)
    entries = [entry for entry in Approvals(site.state_folder).entries() if not entry.over]
    named = [entry for entry in entries if entry.run == wanted]
    fitting = named or [entry for entry in entries if entry.plan.sha256.startswith(wanted.lower())]
    if not named and len(wanted) < _LEAST_DIGITS:
        raise RunNotProposed(
            f"{wanted!r} is too short for a plan's hash and is no run's name",
            remedy=f"Give {_LEAST_DIGITS} digits of the hash or more; `silotune site plans` shows it.",
        )
    if len(fitting) > 1:
        listed = ", ".join(f"{entry.run} (plan {entry.plan.sha256[:12]})" for entry in fitting)
        raise RunNotProposed(
            f"{wanted!r} means more than one open proposal: {listed}",
            remedy="Give the run's name, or more digits of the plan's hash.",
        )
    if not fitting:
        raise RunNotProposed(
            f"no open proposal has the name or the hash {wanted!r}",
            remedy="`silotune site plans` lists what is proposed.",
        )
    return site, fitting[0].run


def _decide(
    site: SiteConfig, run: str, verdict: Literal["approved", "rejected"], reason: str, as_json: bool
) -> None:
    found = ask(site.state_folder, "decide", run=run, verdict=verdict, reason=reason)
    told = "" if found["sent"] else " The coordinator will be told as soon as it can be reached."
    _say(found, f"Run {run} is {verdict}.{told}", as_json)


def _say(found: dict[str, Any], sentence: str, as_json: bool) -> None:
    typer.echo(json.dumps({**found, "time": int(time.time())}) if as_json else sentence)
