"""A run directory, read: its rounds, scores, sites and privacy as data frames, its charts as figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.api.frames import frame, require_figures, shown
from silotune.errors import FileNotOffered
from silotune.plan.plan import Plan
from silotune.report.figures import Summary, summarise
from silotune.report.report import draw_charts, write_report
from silotune.report.report import summary as plain_summary
from silotune.report.verdict import attack_sentences, verdict
from silotune.rounds.run_directory import RunRecord, read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from silotune.api.model import Model


class Run:
    """What a run left, finished or not.

    Parameters
    ----------
    folder : path
        A run directory: what `silotune.simulate` returns, or a folder in ``runs/``.

    Attributes
    ----------
    folder : Path
        The run directory.

    Raises
    ------
    RunDirectoryInvalid
        The folder is no run, or one of its files is damaged.

    Examples
    --------
    >>> import silotune
    >>> run = silotune.Run("runs/small")
    >>> run
    Run('runs/small')
    >>> run.plan.model.labels
    ('no', 'yes')
    >>> run.scores().loc["federated", ["private", "macro_f1"]].notna().all()
    np.True_
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        _ = self.record  # a folder that is no run is refused here, not later

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def __fspath__(self) -> str:
        """The run directory, wherever a path is asked for."""
        return str(self.folder)

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict over the scores."""
        from html import escape

        said = "".join(f"<p>{escape(sentence)}</p>" for sentence in self.verdict)
        name = f"<p><b>{escape(self.folder.name)}</b></p>"
        return name + said + (self.scores().to_html(na_rep="") if self.summary.methods else "")

    @cached_property
    def record(self) -> RunRecord:
        """Everything that was recorded, as it was when it was first asked for."""
        return read_record(self.folder)

    @cached_property
    def plan(self) -> Plan:
        """The plan that was run, with what was replaced for it."""
        return Plan.from_canonical(json.dumps(self.record.plan))

    @cached_property
    def summary(self) -> Summary:
        """The run in a few numbers; not of a run that counted (`statistics`)."""
        return summarise(self.record)

    @property
    def statistics(self) -> dict[str, Any] | None:
        """What a run of ``task = "statistics"`` found; None for one that trained."""
        return self.record.history.found if self.record.finds == "statistics" else None

    @property
    def votes(self) -> dict[str, Any] | None:
        """What a vote among candidates came to; None for any other run."""
        return self.record.history.found if self.record.finds == "votes" else None

    @property
    def verdict(self) -> list[str]:
        """What came of it, in sentences."""
        return [] if self.record.finds else list(verdict(self.summary))

    @property
    def attacks(self) -> list[str]:
        """What attacks on it found, in sentences; none where it was not attacked."""
        return list(attack_sentences(self.record.directory.find_json("attacks.json")))

    def to_json(self, *, beside: Sequence[Run] = ()) -> dict[str, Any]:
        """The summary as plain data: ``silotune report --json``. `beside` is as for `report`."""
        return plain_summary(self.folder, beside=[other.folder for other in beside])

    # --- data frames ---

    def rounds(self) -> DataFrame:
        """One row a finished round.

        Returns
        -------
        DataFrame
            Of shape [rounds, columns], by round: ``trains`` (head or adapter), ``sites`` that replied,
            ``seconds``, ``wait_seconds``, ``aggregate_seconds``, ``bytes_up``, ``bytes_down``,
            ``epsilon`` (the largest over the sites so far), and the scores on held-out data of rounds
            that were evaluated, such as ``macro_f1``.
        """
        spent: dict[int, float] = {}
        for curve in self.summary.epsilon_curves.values():
            for number, value in curve:
                spent[number] = max(value, spent.get(number, 0.0))
        history = self.record.history
        scores = {e.number: e.pooled for e in history.evaluations if e.view == "simulator"}
        rows = [
            {
                "round": found.number,
                "trains": found.trains,
                "sites": len(found.replied),
                **{
                    key: getattr(found, key)
                    for key in ("seconds", "wait_seconds", "aggregate_seconds")
                },
                "bytes_up": found.bytes_up,
                "bytes_down": found.bytes_down,
                "epsilon": spent.get(found.number),
                **scores.get(found.number, {}),
            }
            for found in history.finished_rounds
        ]
        return frame(rows, index="round")

    def scores(self) -> DataFrame:
        """One row a method: the federated model, and the baselines where they were run.

        Returns
        -------
        DataFrame
            Of shape [methods, columns], by method: ``title``, ``private``, ``epsilon``, the scores on
            all sites' held-out test data, ``gain_over_own`` and ``gain_over_probe`` (in the score that
            decides, positive is better), ``seconds``.
        """
        rows = [
            {
                "method": row.key,
                "title": row.title,
                "private": row.private,
                "epsilon": row.epsilon,
                **row.test,
                "gain_over_own": row.gain_over_own,
                "gain_over_probe": row.gain_over_probe,
                "seconds": row.seconds,
            }
            for row in self.summary.methods
        ]
        return frame(rows, index="method")

    def sites(self) -> DataFrame:
        """One row a site.

        Returns
        -------
        DataFrame
            Of shape [sites, columns], by site: ``held_out`` records, the score that decides of each
            model on them (``own``, ``federated``, ``personal``, ``pooled``), ``gain`` of the federated
            one over the site's own, and ``epsilon`` that the site spent.
        """
        found = self.summary
        scored = {row.site: row for row in found.by_site}
        rows = []
        for site in found.sites:
            row = scored.get(site)
            kinds = ("own", "federated", "personal", "pooled")
            rows.append(
                {
                    "site": site,
                    "held_out": row.n if row else None,
                    **{kind: row.score(kind, found.metric) if row else None for kind in kinds},
                    "gain": row.gain if row else None,
                    "epsilon": found.privacy.epsilon_by_site.get(site),
                }
            )
        return frame(rows, index="site")

    # --- figures, pages, models ---

    def figures(self) -> dict[str, Figure]:
        """Every chart that there is something to draw for, by name.

        Returns
        -------
        dict of str to matplotlib Figure
            ``learning``, ``sites``, ``epsilon``, ``timeline``, ``time``, ``bytes``.

        Raises
        ------
        ExtraMissing
            matplotlib is not installed.

        Examples
        --------
        >>> import silotune
        >>> sorted(silotune.Run("runs/small").figures())
        ['bytes', 'epsilon', 'learning', 'sites', 'time', 'timeline']
        """
        require_figures()
        charts = draw_charts(self.record, self.summary)
        return {name: shown(chart.figure()) for name, chart in charts.items()}

    def figure(self, name: str = "learning") -> Figure:
        """One chart by its name. Raises `FileNotOffered` where there is nothing to draw."""
        found = self.figures()
        if name not in found:
            offered = ", ".join(sorted(found)) or "none"
            raise FileNotOffered(f"{self.folder} has no chart {name!r}; it has: {offered}")
        return found[name]

    def report(self, *, beside: Sequence[Run] = ()) -> Path:
        """Write ``report.html`` into the run directory; its path.

        Parameters
        ----------
        beside : sequence of Run
            Other runs of its plan, seeds apart, for the spread of the scores.
        """
        return write_report(self.folder, beside=[other.folder for other in beside])

    def model(self, *, base: str | None = None, device: str = "auto") -> Model:
        """The trained model: `silotune.load` of this run."""
        from silotune.api.model import load

        return load(self, base=base, device=device)
