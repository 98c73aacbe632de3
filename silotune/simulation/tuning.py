"""Tuning: a search over simulated runs of a plan for the settings that validation data like best.

Optuna proposes (Tree-structured Parzen estimator, Bergstra et al., NeurIPS 2011) and stops early what is
behind the median of the runs before it; its study lies in one folder, so that a search goes on where it
was stopped. The first run is the plan as it is: nothing is called better that was not compared with it.

All runs hold the same units out, so the test data of the best one had no part in choosing it.
A search looks at the same records again and again, and no ledger pays for that. It is for public records
or the engineer's own; `silotune.commands.tune` says so.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from silotune.data.site import load_sites
from silotune.errors import ExtraMissing, PlanInvalid, RunDirectoryInvalid, SilotuneError
from silotune.plan.document import canonical_json
from silotune.plan.plan import Plan, dotted
from silotune.plan.ranges import Range
from silotune.plan.tasks import Metric
from silotune.simulation import run
from silotune.simulation.ancestry import secrets_of

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

INSTALL = "pip install 'silotune[tune]'"
STUDY_FILE = "study.db"

_AROUND = 4.0  # what nobody gave a range for is searched from a quarter to four times its value
_PATIENT_ROUNDS = 4  # of a run, before it may be stopped early
_USUAL = ("optimizer.site.head_lr", "optimizer.site.adapter_lr", "privacy.clip")


def distribution(searched: Range) -> BaseDistribution:
    """What Optuna calls a range."""
    from optuna import distributions

    if searched.choices:
        return distributions.CategoricalDistribution(searched.choices)
    low, high, log = searched.low, searched.high, searched.by_logarithm
    if isinstance(low, int) and isinstance(high, int):
        return distributions.IntDistribution(low, high, log=log)
    return distributions.FloatDistribution(low, high, log=log)


def usual_ranges(plan: Plan) -> tuple[Range, ...]:
    """Ranges for an engineer who gave none: rates and clip of what the plan trains."""
    values = dotted(plan.written())
    head, rounds = plan.optimizer.site.head_rounds, plan.rounds.number
    unused = {
        "optimizer.site.adapter_lr": head >= rounds,
        "optimizer.site.head_lr": not plan.task.has_head,
    }
    numbers = {
        key: float(value)
        for key, value in values.items()
        if key.startswith(_USUAL) and isinstance(value, int | float) and not unused.get(key)
    }
    return tuple(
        Range(key=key, low=value / _AROUND, high=value * _AROUND)
        for key, value in numbers.items()
        if not key.endswith("head_share")
    )


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One proposal and what came of it.

    Attributes
    ----------
    number : int
        From 1, in the order they were tried.
    settings : mapping
        Values by dotted key.
    score : float or None
        Mean over its runs; None if it was stopped early or failed.
    state : str
        ``finished``, ``stopped`` (behind the median) or ``failed``.
    reason : str
        Of a failure: code and detail.
    runs : tuple of str
        Its run directories, in the study's folder.
    """

    number: int
    settings: Mapping[str, Any]
    score: float | None
    state: str
    reason: str = ""
    runs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched, and how.

    Attributes
    ----------
    plan_path : Path
        The plan's TOML file.
    folder : Path
        Of the study: Optuna's file and a run directory a run.
    ranges : tuple of Range
        At least one.
    metric : Metric
        Of the validation data.
    sites_folder : Path or None
        Of the simulated sites, if not the plan's own folder.
    overrides : mapping
        Dotted keys that stand for all runs.
    repeats : int
        Runs of a proposal, of which the mean counts: each draws its own noise.
    early : bool
        Whether runs behind the median are stopped.
    seed : int
        Of the proposals.
    """

    plan_path: Path
    folder: Path
    ranges: tuple[Range, ...]
    metric: Metric
    sites_folder: Path | None
    overrides: Mapping[str, Any]
    repeats: int = 1
    early: bool = True
    seed: int = 0

    @property
    def sites_in(self) -> Path:
        """Folder whose subfolders are the sites."""
        return self.sites_folder or self.plan_path.resolve().parent

    @property
    def runs(self) -> Path:
        """Where the run directories are."""
        return self.folder / "runs"

    def secrets(self) -> dict[str, bytes]:
        """What the sites split their units by, in all runs of the study."""
        sites = load_sites(self.sites_in)
        return secrets_of({site.name: self.folder / "sites" / site.name for site in sites})

    @property
    def identity(self) -> dict[str, str]:
        """What may not change between two parts of a search, by name."""
        plan = Plan.load(self.plan_path, self.overrides)
        return {
            "plan": plan.sha256,
            "sites": str(self.sites_in.resolve()),
            "ranges": canonical_json(sorted(map(str, self.ranges))),
            "metric": f"{self.metric.key}, mean of {self.repeats}",
        }


class _Behind(Exception):
    """A run that is stopped early."""


def check(search: Search) -> None:
    """Have the plan take both ends of every range, and have validation data to choose by.

    Raises
    ------
    PlanInvalid
        It doesn't.
    """
    plan = Plan.load(search.plan_path, search.overrides)
    if not plan.data.validation_share:
        raise PlanInvalid(
            "data.validation_share is 0: settings are chosen by validation data, never by test data"
        )
    if not search.ranges:
        raise PlanInvalid("nothing to vary: give --vary key=low:high")
    for each in search.ranges:
        for end in each.ends:
            Plan.load(search.plan_path, {**search.overrides, each.key: end})


def study_of(search: Search) -> optuna.Study:
    """The search's study, new or as it was left; proposals that were cut off are made again.

    Raises
    ------
    ExtraMissing
        Optuna is not installed.
    RunDirectoryInvalid
        The folder has a study of another plan, other sites, ranges or metric, or runs of no study.
    """
    try:
        import optuna
    except ImportError:
        raise ExtraMissing("tuning needs Optuna", remedy=INSTALL) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not (search.folder / STUDY_FILE).exists() and any(search.runs.glob("*")):
        # All runs but the best one's are removed in the end: none may be anybody else's.
        raise RunDirectoryInvalid(f"{search.runs} has runs of no study; take another folder")
    search.folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="tune",
        storage=f"sqlite:///{(search.folder / STUDY_FILE).resolve()}",
        load_if_exists=True,
        direction="maximize" if search.metric.higher_is_better else "minimize",
    )
    own, found = search.identity, study.user_attrs
    if changed := [name for name in own if name in found and found[name] != own[name]]:
        raise RunDirectoryInvalid(
            f"{search.folder} has a study of other {', '.join(changed)}; take another folder"
        )
    for name, text in own.items():
        study.set_user_attr(name, text)
    # By how much there is already: a part that goes on proposes what one in a piece would not repeat.
    study.sampler = optuna.samplers.TPESampler(seed=search.seed + len(study.trials))
    study.pruner = (
        optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=_PATIENT_ROUNDS)
        if search.early
        else optuna.pruners.NopPruner()
    )
    running = optuna.trial.TrialState.RUNNING
    for trial in study.get_trials(deepcopy=False, states=(running,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    if not study.trials and (own_values := _of_the_plan(search)):
        study.enqueue_trial(own_values)
    return study


def _of_the_plan(search: Search) -> dict[str, Any]:
    """What the plan itself says of the varied settings, as far as it is in their ranges."""
    values = dotted(Plan.load(search.plan_path, search.overrides).written())
    return {
        each.key: values[each.key]
        for each in search.ranges
        if each.key in values
        and (
            values[each.key] in each.choices
            if each.choices
            else each.low <= values[each.key] <= each.high
        )
    }


def search_on(
    search: Search,
    *,
    trials: int,
    settings: run.Settings,
    listener: run.Listener,
    begun: Callable[[int, Mapping[str, Any]], object],
    ended: Callable[[Tried], object],
) -> tuple[Tried, ...]:
    """Try proposals until there are so many that finished, were stopped or failed.

    Parameters
    ----------
    search : Search
        What is searched.
    trials : int
        Of the whole study, those of an earlier part included.
    settings : run.Settings
        How to simulate.
    listener : callable
        Given every event of every run.
    begun, ended : callable
        Told of each proposal: its number and settings, and what came of it.

    Raises
    ------
    SilotuneError
        What the first proposal of a study failed with; it is tried first again by the next call.
        Failures of later ones are only noted.
    """
    from optuna.trial import TrialState

    check(search)
    study = study_of(search)
    space = {each.key: distribution(each) for each in search.ranges}
    secrets = search.secrets()
    while len(results(study)) < trials:
        trial = study.ask(space)
        begun(trial.number + 1, proposed(trial.params))
        try:
            value = _tried(search, trial, secrets=secrets, settings=settings, listener=listener)
        except _Behind:
            study.tell(trial, state=TrialState.PRUNED)
        except SilotuneError as exc:
            if not results(study):
                raise  # the plan itself: left open, it is the first again when that is mended
            trial.set_user_attr("reason", f"{exc.code} {exc.detail}")
            study.tell(trial, state=TrialState.FAIL)
        else:
            failed = math.isnan(value)
            if failed:
                trial.set_user_attr("reason", f"{search.metric.key} is not a number")
            study.tell(trial, None if failed else value, state=TrialState.FAIL if failed else None)
        ended(_told(study.trials[trial.number]))
    return results(study)


def proposed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's values as a person would write them: three digits are all that noise leaves of any."""
    return {
        key: float(f"{value:.3g}") if isinstance(value, float) else value
        for key, value in values.items()
    }


def _tried(
    search: Search,
    trial: optuna.Trial,
    *,
    secrets: Mapping[str, bytes],
    settings: run.Settings,
    listener: run.Listener,
) -> float:
    """The mean score of a proposal's runs."""
    scores: list[float] = []
    for repeat in range(search.repeats):
        seen: list[float] = []

        def look(event: Mapping[str, Any], *, first: bool = repeat == 0) -> None:
            listener(event)
            if (event.get("view"), event.get("split")) != ("simulator", "validation"):
                return
            seen.append(float(event["pooled"][search.metric.key]))  # noqa: B023 - called in this turn
            if first:
                trial.report(seen[-1], step=event["round"])  # noqa: B023
                if trial.should_prune():
                    raise _Behind

        directory = run.simulate(
            search.plan_path,
            runs=search.runs,
            settings=settings,
            listener=look,
            sites_folder=search.sites_folder,
            secrets=secrets,
            overrides={**search.overrides, **proposed(trial.params)},
        )
        names = [*trial.user_attrs.get("runs", ()), directory.name]
        trial.set_user_attr("runs", names)
        scores.append(seen[-1])
    return fmean(scores)


def results(study: optuna.Study) -> tuple[Tried, ...]:
    """All proposals that came to an end, in the order they were made."""
    return tuple(_told(trial) for trial in study.get_trials(deepcopy=False) if _ended(trial))


def _ended(trial: FrozenTrial) -> bool:
    """Whether it was tried: one that was cut off, and is made again, has no reason."""
    return trial.state.is_finished() and (
        trial.state.name != "FAIL" or "reason" in trial.user_attrs
    )


def _told(trial: FrozenTrial) -> Tried:
    states = {"COMPLETE": "finished", "PRUNED": "stopped", "FAIL": "failed"}
    finished = trial.state.name == "COMPLETE"
    return Tried(
        number=trial.number + 1,
        settings=proposed(trial.params),
        score=trial.value if finished else None,
        state=states[trial.state.name],
        reason=trial.user_attrs.get("reason", ""),
        runs=tuple(trial.user_attrs.get("runs", ())),
    )


def best_of(search: Search, found: Sequence[Tried]) -> Tried | None:
    """The finished one with the best score, the earliest of equals."""
    scored = [(each.score, each) for each in found if each.score is not None]
    if not scored:
        return None
    return (max if search.metric.higher_is_better else min)(scored, key=lambda pair: pair[0])[1]


def remove_runs(search: Search, *, keep: Tried | None) -> None:
    """Remove the run directories of all proposals but one."""
    kept = set(keep.runs if keep else ())
    for folder in search.runs.glob("*/"):  # none, if no proposal came so far
        if folder.name not in kept:
            shutil.rmtree(folder)
