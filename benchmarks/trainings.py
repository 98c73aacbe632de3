"""Plans as the package's own trainers and server train them: scores on held-out records."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from silotune.data.records import Split
from silotune.data.site import load_sites
from silotune.models.choices import choose
from silotune.plan.plan import Plan
from silotune.simulation.baselines import IN_THE_CLEAR, Job, Kind, Outcome, run_jobs
from silotune.simulation.outcome import metrics_of

OPEN = {f"privacy.{key}": None for key in ("epsilon", "delta", "clip")} | {"privacy.mode": "none"}


class Cell(Protocol):
    """What of a table is trained at a time, named by its key."""

    @property
    def key(self) -> str: ...


def budget(epsilon: float | None) -> dict[str, Any]:
    """Settings of a plan at an epsilon; at none without privacy."""
    return {"privacy.epsilon": epsilon} if epsilon else {**IN_THE_CLEAR, **OPEN}


def kept_cells(folder: Path) -> dict[str, float]:
    """Scores by key that an earlier call left in a folder."""
    kept = folder / "cells.json"
    return json.loads(kept.read_text("utf-8")) if kept.exists() else {}


def fill(cells: Iterable[Cell], folder: Path, score: Callable[[Any], float]) -> dict[str, float]:
    """Train what a folder lacks, and keep every cell at once: a stopped benchmark goes on there."""
    found, kept = kept_cells(folder), folder / "cells.json"
    todo = [cell for cell in cells if cell.key not in found]
    for number, cell in enumerate(todo, start=1):
        started = time.process_time()
        found[cell.key] = round(score(cell), 4)
        kept.with_suffix(".new").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        kept.with_suffix(".new").replace(kept)
        seconds = time.process_time() - started
        print(
            f"{number} of {len(todo)}, {cell.key}: {found[cell.key]} ({seconds:.0f} s)", flush=True
        )
    return found


def told(scores: Sequence[float]) -> str:
    """Mean (standard deviation), and how many seeds where not five; nothing of none."""
    if not scores:
        return ""
    mean = f"{statistics.fmean(scores):.3f}".removeprefix("0")
    if len(scores) == 1:
        return f"{mean} [1]"
    shown = f"({spread(scores):.3f})".replace("(0", "(")
    return f"{mean} {shown}" + ("" if len(scores) == 5 else f" [{len(scores)}]")


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
    """Each training as it ends, with the first metric of its task on everybody's held-out records."""
    for done in run_jobs(list(jobs), workers=workers):
        plan = Plan.from_canonical(done.job.plan)
        yield done, metrics_of(plan, sum(done.counts.values()))[plan.task.metrics[0].key]


def mean_reached(
    key: str,
    plan: Plan,
    *,
    sites: Sequence[str],
    shared: Path,
    kind: Kind = "federated",
    on: Split = Split.TEST,
) -> float:
    """The score of one training; of ``own`` the mean over the sites, each alone."""
    alone = [Path(path).parent.name for path in sites] if kind == "own" else [None]
    jobs = (
        training(key, plan, sites=sites, shared=shared, kind=kind, site=site, on=on)
        for site in alone
    )
    return statistics.fmean(score for _, score in reached(jobs))


def kept_scores(cells: Path | None) -> dict[str, float]:
    """Scores by name that an earlier call wrote to a file of lines."""
    if cells is None or not cells.exists():
        return {}
    return dict(json.loads(line) for line in cells.read_text().splitlines())


def keep_score(cells: Path | None, name: str, score: float) -> None:
    """Add a line for `kept_scores`."""
    if cells is not None:
        with cells.open("a") as file:
            file.write(json.dumps([name, score]) + "\n")


def spread(scores: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of one."""
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def show(found: Mapping[str, Sequence[float]], *, width: int) -> None:
    """Print mean and standard deviation of each row."""
    for row, scores in sorted(found.items()):
        print(f"  {row:{width}} {statistics.fmean(scores):.3f} ({spread(scores):.3f})")
