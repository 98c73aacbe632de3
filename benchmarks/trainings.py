"""Plans as the package's own trainers and server train them: macro-F1 on held-out records."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from silotune.data.records import Split
from silotune.data.site import load_sites
from silotune.models.choices import choose
from silotune.plan.plan import Plan
from silotune.simulation.baselines import Job, Kind, Outcome, run_jobs
from silotune.simulation.outcome import metrics_of


def sites_in(folder: Path) -> tuple[str, ...]:
    """The site.toml of each site in a folder."""
    return tuple(str(site.folder / "site.toml") for site in load_sites(folder))


def training(
    key: str,
    plan: Plan,
    *,
    sites: Sequence[str],
    shared: Path,
    kind: Kind = "federated",
    site: str | None = None,
    on: Split = Split.TEST,
) -> Job:
    """One training of a plan; frozen features are kept in `shared`."""
    return Job(
        key=key,
        title=key,
        plan=plan.canonical(),
        kind=kind,
        sites=tuple(sites),
        choices=asdict(choose(plan)),
        shared=str(shared),
        site=site,
        on=on,
    )


def reached(jobs: Iterable[Job], *, workers: int = 1) -> Iterator[tuple[Outcome, float]]:
    """Each training as it ends, with macro-F1 on everybody's held-out records."""
    for done in run_jobs(list(jobs), workers=workers):
        plan = Plan.from_canonical(done.job.plan)
        yield done, metrics_of(plan, sum(done.counts.values()))["macro_f1"]


def spread(scores: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of one."""
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def show(found: Mapping[str, Sequence[float]], *, width: int) -> None:
    """Print mean and standard deviation of each row."""
    for row, scores in sorted(found.items()):
        print(f"  {row:{width}} {statistics.fmean(scores):.3f} ({spread(scores):.3f})")
