"""`silotune tune`: which settings of a plan do best, by search over simulated runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from silotune.commands.asked import Device
from silotune.commands.folder import AsJson
from silotune.commands.new_plan import TITLES, rendered
from silotune.commands.plan import Overrides, parsed
from silotune.commands.vote import EPSILON, tuned_in_private
from silotune.plan.left_out import Number
from silotune.plan.plan import Plan
from silotune.plan.sections import BLOCK_UNITS
from silotune.terminal import headed, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from silotune.api.tuning import Tuned
    from silotune.simulation.tuning import Search, Tried

BEST_FILE = "best.toml"
_SHOWN = 10
_OF_SEARCHES = ("trials", "metric", "repeats", "early", "keep", "seed")
_OF_VOTES = ("epsilon", "block_units")

UNPAID = (
    "This search looked at the sites' records {runs} times and no ledger paid for it: what it chose can "
    "tell something of them. Tune on public records, or on your own; sites' ledgers pay for a run of "
    "the plan that came out, and not for how it was found."
)


def tune(  # noqa: PLR0917 - one a command-line option
    ctx: typer.Context,
    plan: Annotated[
        Path,
        typer.Argument(
            help="The plan's TOML file; its folder holds the sites.", show_default=False
        ),
    ],
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="key=low:high (by logarithm if high is ten times low, whole numbers if both are) or "
            "key=value,value; repeatable. Learning rates and clip, a quarter to four times, by default."
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Proposals to try, those of an earlier part included.")
    ] = 20,
    study: Annotated[
        Path | None,
        typer.Option(help="The study's folder: the same one goes on. PLAN-tune by default."),
    ] = None,
    sites: Annotated[
        Path | None, typer.Option(help="Folder of the site folders, if not the plan's own.")
    ] = None,
    metric: Annotated[
        str,
        typer.Option(help="Of the validation data; the one that decides for the task by default."),
    ] = "",
    repeats: Annotated[
        int, typer.Option(min=1, help="Runs of each proposal, of which the mean counts.")
    ] = 1,
    early: Annotated[
        bool, typer.Option("--early/--to-the-end", help="Stop runs that are behind the median.")
    ] = True,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep all run directories, not the best one's only.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes; 0 takes one a core.")] = 0,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the proposals; runs draw their own noise.")] = 0,
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="Have the sites' records vote on fixed values, for epsilon (below)."
        ),
    ] = False,
    epsilon: Annotated[
        float, typer.Option(min=0.01, help="With --private: what the vote costs each unit.")
    ] = EPSILON,
    block_units: Annotated[
        int,
        typer.Option(min=10, help="With --private: units of a block; each block has one vote."),
    ] = BLOCK_UNITS,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Search for settings that do best on validation data, over simulated runs of a plan.

    The first run is the plan as it is. Optuna proposes the others, runs that fall behind are stopped
    early, and a search that was interrupted goes on with the same command. All runs hold the same units
    out; test data choose nothing. The best settings are written as a plan of their own.

    A search is not private: it looks at the same records in every run, and no ledger pays for that. Use
    public records or your own. Needs `pip install 'silotune[tune]'`.

    With --private there is no search but a vote: `--vary key=value,value` names the candidates, every
    site trains each of them in blocks of its own units, and a block votes for what did best there. All
    votes together are one noisy release, which a site's ledger pays for. PLAN-vote/vote.toml is the plan
    of that vote: the simulation runs it here, and a coordinator proposes it to real sites.
    """
    _fits(ctx, private=private)
    if private:
        tuned_in_private(
            plan,
            vary=vary or (),
            study=study,
            sites=sites,
            epsilon=epsilon,
            block_units=block_units,
            workers=workers,
            device=device,
            settings=parsed(overrides or []),
            as_json=as_json,
        )
        return
    from silotune.api.tuning import search_of

    console = terminal(stderr=as_json)
    try:
        search = search_of(
            plan,
            vary=vary or (),
            study=study,
            sites=sites,
            metric=metric,
            repeats=repeats,
            early=early,
            seed=seed,
            settings=parsed(overrides or []),
        )
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--metric") from None
    for each in search.ranges:
        console.print(headed("Varied.", f"{each}{', by logarithm' * each.by_logarithm}"))
    done = _searched(
        search, trials=trials, keep=keep, workers=workers, device=device, console=console
    )
    if done.best is not None:
        (search.folder / BEST_FILE).write_text(_plan_of(search, done.best), encoding="utf-8")
    _tell(search, done.tried, done.best, console=console, as_json=as_json)


def _fits(ctx: typer.Context, *, private: bool) -> None:
    """Refuse options of the other way to tune, which would be without effect."""
    for name in _OF_SEARCHES if private else _OF_VOTES:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            (option,) = (each for each in ctx.command.params if each.name == name)
            raise typer.BadParameter(
                "is of a search; a vote (--private) has none of it"
                if private
                else "is of a vote: add --private. A search has no epsilon, and is not private",
                param_hint=option.opts[0],
            )


def _searched(
    search: Search, *, trials: int, keep: bool, workers: int, device: str, console: Console
) -> Tuned:
    """Try the proposals: a line each, and on a terminal the run that goes on."""
    from silotune.api.tuning import searched
    from silotune.simulation.progress import Progress

    shown: list[Progress] = []

    def begun(number: int, values: Mapping[str, Any]) -> None:
        if console.is_terminal:
            console.print(headed(f"{number} of {trials}", _values(values)))
            shown.append(Progress(console))
            shown[-1].__enter__()

    def close() -> None:
        while shown:
            shown.pop().__exit__(None, None, None)

    def ended(tried: Tried) -> None:
        close()
        score = tried.reason or tried.state
        if tried.score is not None:
            score = f"{search.metric.title} {tried.score:.4f}"
        console.print(
            f"{tried.number}/{trials}: {score}  ({_values(tried.settings)})", soft_wrap=True
        )

    def listen(event: Mapping[str, Any]) -> None:
        if shown:
            shown[-1](event)

    try:
        return searched(
            search,
            trials=trials,
            keep=keep,
            workers=workers,
            device=device,
            listener=listen,
            begun=begun,
            ended=ended,
        )
    finally:
        close()


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plan_of(search: Search, best: Tried) -> str:
    """The plan's file with the best settings in it, and why beside them."""
    written = Plan.written_in(search.plan_path, {**search.overrides, **best.settings})
    tables = written.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    whys = {
        each.key: f"tuned, {str(each).removeprefix(each.key).strip()}" for each in search.ranges
    }
    return rendered([*_lines_of(tables, whys)], written_by=f"tune {search.plan_path.name}")


def _lines_of(tables: Mapping[str, Any], whys: Mapping[str, str]) -> Iterator[Number]:
    for section in TITLES:
        table: Any = tables
        for part in section.split("."):
            table = table.get(part, {})
        for name, value in table.items():
            key = f"{section}.{name}"
            if key not in TITLES and not any(title.startswith(f"{key}.") for title in TITLES):
                inside = [
                    f"{k[len(key) + 1 :]} {w}" for k, w in whys.items() if k.startswith(f"{key}.")
                ]
                yield Number(key=key, value=value, why=whys.get(key, ", ".join(inside)))


def _tell(
    search: Search,
    found: tuple[Tried, ...],
    best: Tried | None,
    *,
    console: Console,
    as_json: bool,
) -> None:
    """The best proposals, where the best plan is, and what this was not."""
    # The run in which a proposal was stopped, or failed, looked too, and is not among its own.
    runs = sum(min(search.repeats, len(each.runs) + 1) for each in found)
    where = search.folder / BEST_FILE
    if as_json:
        facts = {
            "metric": search.metric.key,
            "best": asdict(best) if best else None,
            "trials": [asdict(each) for each in found],
            "plan": str(where) if best else None,
            "paid_in_epsilon": False,
        }
        typer.echo(json.dumps(facts))
        return
    table = Table()
    for column in ("trial", search.metric.title, *(each.key for each in search.ranges)):
        table.add_column(column, overflow="fold", justify="right")
    sign = -1.0 if search.metric.higher_is_better else 1.0
    scored = [each for each in found if each.score is not None]
    scored.sort(key=lambda each: sign * (each.score or 0.0))
    for each in scored[:_SHOWN]:
        values = (_short(each.settings[r.key]) for r in search.ranges)
        table.add_row(str(each.number), f"{each.score:.4f}", *values)
    console.print(table)
    counts = {state: sum(each.state == state for each in found) for state in ("stopped", "failed")}
    if any(counts.values()):
        console.print(f"{counts['stopped']} stopped early, {counts['failed']} failed.")
    if best is None:
        console.print("No proposal came to a score.")
        return
    console.print(f"Best plan: {where}", soft_wrap=True)
    console.print(f"Its run:   {search.runs / best.runs[-1]}", soft_wrap=True)
    console.print(headed("Not private.", UNPAID.format(runs=runs), style="yellow"))
