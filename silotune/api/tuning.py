"""Settings of a plan that do best, by search over simulated runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.api import progress as showing
from silotune.api.frames import frame
from silotune.api.run import Run
from silotune.errors import PlanInvalid
from silotune.plan.plan import Plan
from silotune.plan.ranges import Range
from silotune.plan.tasks import Metric
from silotune.simulation import tuning
from silotune.simulation.run import Listener, Settings
from silotune.simulation.tuning import Search, Tried

if TYPE_CHECKING:
    from pandas import DataFrame

PathText = str | PathLike[str]


@dataclass(frozen=True)
class Tuned:
    """What `silotune.tune` found; it is not private: no ledger paid for looking so often.

    Attributes
    ----------
    search : Search
        What was searched; ``search.metric`` is what decided.
    tried : tuple of Tried
        Every proposal and what came of it; the first is the plan as it is.
    best : Tried or None
        The one with the best score on validation data.
    """

    search: Search
    tried: tuple[Tried, ...]
    best: Tried | None

    def to_frame(self) -> DataFrame:
        """One row a proposal: ``state``, ``score``, and the value of each setting."""
        rows = (
            {"trial": one.number, "state": one.state, "score": one.score, **one.settings}
            for one in self.tried
        )
        return frame(rows, index="trial")

    def plan(self) -> Plan:
        """The plan with the best settings. Raises `PlanInvalid` where no proposal came to a score."""
        if self.best is None:
            raise PlanInvalid("no proposal came to a score")
        return Plan.load(self.search.plan_path, {**self.search.overrides, **self.best.settings})

    def run(self) -> Run | None:
        """The newest run of the best proposal."""
        return None if self.best is None else Run(self.search.runs / self.best.runs[-1])


def tune(
    plan: PathText,
    *,
    vary: Iterable[str] = (),
    trials: int = 20,
    study: PathText | None = None,
    sites: PathText | None = None,
    metric: str = "",
    repeats: int = 1,
    early: bool = True,
    keep: bool = False,
    workers: int = 0,
    device: str = "auto",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Tuned:
    """Search for settings that do best on validation data; use public records, or your own.

    Parameters
    ----------
    plan : path
        The plan's file; its folder holds the sites.
    vary : iterable of str
        ``key=low:high`` or ``key=value,value``; learning rates and clip by default.
    trials : int
        Proposals to try, those of an earlier part of the study included.
    study : path, optional
        The study's folder: the same one goes on. ``PLAN-tune`` beside the plan by default.
    sites : path, optional
        Folder of the site folders, if not the plan's own.
    metric : str
        Of the validation data; the one that decides for the task by default.
    repeats : int
        Runs of each proposal, of which the mean counts.
    early, keep : bool
        Stop runs that are behind the median; keep the runs of all proposals.
    workers, device
        As for `silotune.simulate`.
    seed : int
        Of the proposals; runs draw their own noise.
    settings : mapping, optional
        Dotted keys that stand for all runs.
    progress : bool
        Show a bar over the proposals.

    Raises
    ------
    ExtraMissing
        Optuna is not here: ``pip install 'silotune[tune]'``.
    PlanInvalid
        The plan can't take the ends of a range, or has no validation data.

    Examples
    --------
    >>> import silotune
    >>> found = silotune.tune(
    ...     "hospitals/plan.toml", vary=["privacy.clip=0.1:2.0"], trials=1, study="tuned", progress=False
    ... )
    >>> found.to_frame().columns.tolist()
    ['state', 'score', 'privacy.clip']
    >>> found.plan().privacy.clip == found.best.settings["privacy.clip"]
    True
    """
    search = search_of(
        plan,
        vary=vary,
        study=study,
        sites=sites,
        metric=metric,
        repeats=repeats,
        early=early,
        seed=seed,
        settings=settings,
    )
    with showing.bar(trials, "trials", hidden=not progress) as shown:
        return searched(
            search,
            trials=trials,
            keep=keep,
            workers=workers,
            device=device,
            ended=lambda tried: shown.update(1),
        )


def search_of(
    plan: PathText,
    *,
    vary: Iterable[str] = (),
    study: PathText | None = None,
    sites: PathText | None = None,
    metric: str = "",
    repeats: int = 1,
    early: bool = True,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Search:
    """What `tune` searches, of its parameters. Raises `PlanInvalid`."""
    path, overrides = Path(plan), dict(settings or {})
    read = Plan.load(path, overrides)
    return Search(
        plan_path=path,
        folder=path.parent / f"{path.stem}-tune" if study is None else Path(study),
        ranges=tuple(map(Range.parse, vary)) or tuning.usual_ranges(read),
        metric=_metric(read, metric),
        sites_folder=None if sites is None else Path(sites),
        overrides=overrides,
        repeats=repeats,
        early=early,
        seed=seed,
    )


def _metric(plan: Plan, key: str) -> Metric:
    """The metric to choose by."""
    known = plan.task.metrics
    if not known:
        raise PlanInvalid("a plan that counts trains nothing that could be tuned")
    for each in known:
        if key in {"", each.key}:
            return each
    raise ValueError(f"{plan.model.task} has {', '.join(each.key for each in known)}")


def searched(
    search: Search,
    *,
    trials: int,
    keep: bool = False,
    workers: int = 0,
    device: str = "auto",
    listener: Listener = showing.silent,
    begun: Callable[[int, Mapping[str, Any]], object] = lambda number, values: None,
    ended: Callable[[Tried], object] = showing.silent,
) -> Tuned:
    """Try proposals; `listener`, `begun` and `ended` are told of all that happens."""
    found = tuning.search_on(
        search,
        trials=trials,
        settings=Settings(workers=workers, device=device),
        listener=listener,
        begun=begun,
        ended=ended,
    )
    best = tuning.best_of(search, found)
    if not keep:
        tuning.remove_runs(search, keep=best)
    return Tuned(search, found, best)
