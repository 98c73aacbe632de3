"""Runs side by side: what their plans say differently, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from silotune.api.frames import frame, require_figures, shown
from silotune.api.run import Run
from silotune.errors import RunDirectoryInvalid
from silotune.plan.plan import dotted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_NEVER_TELLS = {"plan.name", "plan.purpose"}


@dataclass(frozen=True)
class Comparison:
    """What `silotune.compare` found.

    Attributes
    ----------
    rows : tuple of dict
        One a run: ``run``, ``rounds`` finished, ``private``, ``epsilon`` spent at most, scores of the
        federated model on held-out test data, ``gain_over_own``, ``seconds``, ``bytes_up``.
    settings : dict of str to tuple
        Plan keys in which the runs differ, with the value of each run (None where it is not set).
    score : str
        The score that decides, such as ``macro_f1``.
    """

    rows: tuple[dict[str, Any], ...]
    settings: Mapping[str, tuple[Any, ...]]
    score: str

    def to_frame(self) -> DataFrame:
        """One row a run: the settings that differ, then what came of them.

        Returns
        -------
        DataFrame
            Of shape [runs, columns], by the run's name.
        """
        return frame(
            (
                {"run": row["run"]}
                | {key: values[at] for key, values in self.settings.items()}
                | row
                for at, row in enumerate(self.rows)
            ),
            index="run",
        )

    def _repr_html_(self) -> str:
        html: str = self.to_frame().to_html(na_rep="")
        return html

    def figure(self) -> Figure:
        """Bars of the score that decides, a run each, in the order that was given.

        Raises
        ------
        ExtraMissing
            matplotlib is not installed.
        """
        require_figures()
        from silotune.report.charts import score_bars

        return shown(score_bars([(r["run"], r.get(self.score)) for r in self.rows], self.score))


def compare(*runs: Run | str | PathLike[str]) -> Comparison:
    """Put runs side by side, such as one plan under several epsilons.

    Parameters
    ----------
    *runs : Run or path
        Two or more, finished or not; runs of one task can be compared.

    Raises
    ------
    RunDirectoryInvalid
        Fewer than two, one is no run or counted, or they are of different tasks.

    Examples
    --------
    >>> import silotune
    >>> found = silotune.compare("runs/small", "runs/other")
    >>> found.settings
    {'privacy.epsilon': (8.0, 4.0)}
    >>> found.to_frame().shape[0]
    2
    """
    found = [run if isinstance(run, Run) else Run(run) for run in runs]
    if len(found) < 2:
        raise RunDirectoryInvalid("a comparison takes two runs or more")
    if any(run.record.finds for run in found):
        raise RunDirectoryInvalid("a run that counted has no scores to compare")
    tasks = {str((run.record.plan.get("model") or {}).get("task")) for run in found}
    if len(tasks) > 1:
        raise RunDirectoryInvalid(f"runs of different tasks: {', '.join(sorted(tasks))}")
    return Comparison(
        rows=tuple(_row(run) for run in found),
        settings=_differing(found),
        score=found[0].summary.metric.key,
    )


def _row(run: Run) -> dict[str, Any]:
    found = run.summary
    federated = found.method("federated")
    scores = dict(federated.test) if federated else {}
    if not scores and found.last_score:  # an unfinished run has its newest look
        scores = {k: v for k, v in found.last_score.items() if isinstance(v, float)}
    return {
        "run": run.folder.resolve().name,
        "rounds": found.rounds_finished,
        "private": found.privacy.private,
        "epsilon": found.privacy.epsilon,
        **scores,
        "gain_over_own": federated.gain_over_own if federated else None,
        "seconds": found.time.rounds,
        "bytes_up": found.bytes_up,
    }


def _differing(runs: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
    tables = [dotted(run.record.plan) for run in runs]
    keys = sorted({key for table in tables for key in table} - _NEVER_TELLS)
    found = {key: tuple(table.get(key) for table in tables) for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}
