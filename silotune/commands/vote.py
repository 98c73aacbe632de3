"""Votes by the command line: `silotune tune --private`, `plan vote`, `plan chosen`, `runs votes`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.commands.folder import HERE, AsJson, Folder, numbers_of_units
from silotune.commands.statistics import show_found
from silotune.errors import PlanInvalid
from silotune.plan.plan import Plan
from silotune.plan.sections import BLOCK_UNITS
from silotune.plan.voted import VARIED
from silotune.plan.written import plan_toml
from silotune.terminal import headed, terminal

if TYPE_CHECKING:
    from rich.console import Console


VOTE_FILE, CHOSEN_FILE = "vote.toml", "chosen.toml"

EPSILON = 0.5
"""What a vote costs, if nothing is said: little beside a training."""

Vary = Annotated[
    list[str],
    typer.Option(
        help="key=value,value: candidates have these values; repeatable, and then every combination "
        f"is one. Keys begin with {', '.join(VARIED)}."
    ),
]
Epsilon = Annotated[float, typer.Option(min=0.01, help="What the vote costs each unit.")]
BlockUnits = Annotated[
    int, typer.Option(min=10, help="Units that a block is expected to have; each has one vote.")
]


def vote(  # noqa: PLR0917 - one a command-line option
    plan: Annotated[Path, typer.Argument(help="The plan that is to be trained.")],
    vary: Vary,
    out: Annotated[Path, typer.Option(help="The plan of the vote is written here.")] = Path(
        VOTE_FILE
    ),
    epsilon: Epsilon = EPSILON,
    block_units: BlockUnits = BLOCK_UNITS,
    units: Annotated[
        str,
        typer.Option(
            help="That the sites declare: one number of all, or one a site: 1000,2500. Default: the "
            "site folders' own."
        ),
    ] = "",
) -> None:
    """Write a plan by which the sites vote on settings of another, within one charged release.

    Each site trains every candidate in blocks of its own units, and a block votes for what did best
    there. It is proposed, approved and charged like any plan; `silotune coordinator runs votes` shows
    what came of it, and `silotune plan chosen` writes the plan with what was chosen.
    """
    from silotune.api.voting import vote_of
    from silotune.data.site import declared_units, load_sites

    read = Plan.load(plan)
    if units:
        declared = sum(numbers_of_units(units, option="--units"))
    else:
        beside = any(plan.resolve().parent.glob("*/site.toml"))
        sites = load_sites(plan.resolve().parent) if beside else ()
        declared = sum(declared_units(sites, read.data.dataset).values())
    if not declared:
        raise typer.BadParameter(
            "no site folder lies beside the plan: say how many the sites have, e.g. 1000,2500",
            param_hint="--units",
        )
    made = vote_of(read, vary, epsilon=epsilon, block_units=block_units, units=declared)
    write_vote(out, made, plan)
    console = terminal()
    say_of(read, made, console)
    console.print(f"The vote: {out}. Its costs: silotune plan check {out}", soft_wrap=True)


def write(out: Path, made: Plan, plan: Path, *, head: str) -> None:
    """Write what is made of a plan's file, never over that file."""
    if out.resolve() == plan.resolve():
        raise typer.BadParameter("this is the plan that is voted on", param_hint="--out")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"# {head}\n{plan_toml(made)}", encoding="utf-8")


def write_vote(out: Path, made: Plan, plan: Path) -> None:
    """Write a vote's file."""
    head = f"A vote on settings of {plan.name}, written by silotune. docs/plans.md explains it."
    write(out, made, plan, head=head)


def say_of(plan: Plan, made: Plan, console: Console) -> None:
    """What differs between what is tried and what will be trained."""
    if plan.head_rounds < plan.rounds.number:
        text = (
            f"the plan trains an adapter; candidates train its head alone, in all "
            f"{plan.rounds.number} rounds"
        )
        console.print(headed("Note.", f"{text}.", style="yellow"))
    assert made.vote is not None
    console.print(
        f"{len(made.vote.candidates)} candidates, blocks of about {made.vote.block_units} "
        f"{made.privacy.unit}s, epsilon {made.privacy.epsilon:g}.",
        soft_wrap=True,
    )


def chosen(
    plan: Annotated[Path, typer.Argument(help="The plan that was voted on.")],
    votes: Annotated[Path, typer.Argument(help="The votes.json of the run.")],
    out: Annotated[Path, typer.Option(help="The plan is written here.")] = Path(CHOSEN_FILE),
) -> None:
    """Write a plan with the settings that a vote chose, to be proposed or simulated."""
    from silotune.report.votes import read

    found = read(votes)
    written = Plan.written_in(plan)
    if written.plan.name != found["plan"]:
        raise PlanInvalid(
            f"{votes} is a vote on the plan {found['plan']!r}, not {written.plan.name!r}"
        )
    write_chosen(out, plan, found)
    terminal().print(f"Plan: {out}", soft_wrap=True)


def write_chosen(
    out: Path, plan: Path, found: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> None:
    """Write the plan's file with what a vote chose, and what was replaced in it before."""
    made = Plan.written_in(plan, {**(settings or {}), **found["settings"]})
    head = (
        f"{plan.name} with candidate {found['chosen']} of the vote {found.get('run', '')}, which cost "
        f"epsilon {found['epsilon']:g}."
    )
    write(out, made, plan, head=head)


def votes(
    run: Annotated[str, typer.Argument(help="The run's name, as `run` printed it.")],
    out: Annotated[
        Path | None, typer.Option(help="Also write votes.json here, for `silotune plan chosen`.")
    ] = None,
    folder: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show what a vote came to: the votes of each candidate, and how sure the first place is."""
    from silotune.report.votes import print_votes

    show_found(run, "votes.json", print_votes, out=out, folder=folder, as_json=as_json)


def tuned_in_private(
    plan: Path,
    *,
    vary: Sequence[str],
    study: Path | None,
    sites: Path | None,
    epsilon: float,
    block_units: int,
    workers: int,
    device: str,
    settings: Mapping[str, Any],
    as_json: bool,
) -> None:
    """`silotune tune --private`: a vote of simulated sites, and the plan that came of it."""
    from silotune.api import simulating
    from silotune.api.voting import vote_of
    from silotune.data.site import declared_units, load_sites
    from silotune.report.votes import print_votes

    console, read = terminal(stderr=as_json), Plan.load(plan, settings)
    folder = study or plan.parent / f"{plan.stem}-vote"
    places = sites or plan.resolve().parent
    units = sum(declared_units(load_sites(places), read.data.dataset).values())
    made = vote_of(read, vary, epsilon=epsilon, block_units=block_units, units=max(1, units))
    write_vote(folder / VOTE_FILE, made, plan)
    say_of(read, made, console)
    done = simulating.simulate(
        folder / VOTE_FILE,
        sites=places,
        runs=folder / "runs",
        workers=workers,
        device=device,
        progress=console,
    )
    found = {"run": done.folder.name, **(done.votes or {})}
    write_chosen(folder / CHOSEN_FILE, plan, found, settings)
    if as_json:
        told = {"votes": found, "plan": str(folder / CHOSEN_FILE), "paid_in_epsilon": True}
        typer.echo(json.dumps(told))
        return
    print_votes(found, console)
    console.print(f"Chosen plan: {folder / CHOSEN_FILE}", soft_wrap=True)
    console.print(f"The vote, to be proposed to real sites: {folder / VOTE_FILE}", soft_wrap=True)
