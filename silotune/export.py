"""Curves of runs, written for other tools: TensorBoard and MLflow.

A curve has one number a round under a name, with the time at which it became known. Nothing is in it
that the run's events do not tell: metrics that sites released (or, of a simulation, what the simulator
saw), epsilon, seconds, bytes and the norm of the update.

TensorBoard gets its event files. MLflow gets a tracking store in one SQLite file: a folder of files, its
older store, is in maintenance mode and is refused by its current versions.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from silotune.dashboard.run_page import Spending
from silotune.errors import ExportInTheWay, ExtraMissing
from silotune.events.schema import Evaluated, RoundFinished, RoundStarted, parse
from silotune.events.source import Row, RunDirectories, RunFacts
from silotune.events.view import RunView
from silotune.plan.plan import dotted

_PER_ROUND = ("seconds", "wait_seconds", "aggregate_seconds", "bytes_up", "bytes_down")


@dataclass(frozen=True)
class Point:
    """One value of a curve: the round, the Unix time at which it became known, the value."""

    round: int
    time: float
    value: float


@dataclass(frozen=True, kw_only=True)
class RunCurves:
    """A run as other tools take it.

    Attributes
    ----------
    facts : RunFacts
        The run.
    curves : mapping of str to list of Point
        By name, such as ``released/validation/macro_f1`` or ``epsilon/north``; rounds ascend.
    began, ended : float or None
        Unix times of the first and of the last event.
    """

    facts: RunFacts
    curves: Mapping[str, Sequence[Point]]
    began: float | None
    ended: float | None

    @property
    def settings(self) -> dict[str, str]:
        """The plan's settings by dotted key, and its hash, as text."""
        plain = {key: str(value) for key, value in dotted(self.facts.plan).items()}
        return {**plain, "plan_sha256": self.facts.plan_sha256}


def of_directory(folder: Path) -> RunCurves:
    """The curves of a run directory, also while the run goes on.

    Raises
    ------
    RunDirectoryInvalid
        It is none.
    EventMalformed
        Its events were edited.
    """
    source = RunDirectories(folder)
    run = folder.resolve().name
    return collect(source.facts(run), source.events(run))


class RunsApi(Protocol):
    """A coordinator's admin API, of which this needs two calls."""

    messages: Any

    def call(self, name: str, request: Any) -> dict[str, Any]:
        """A call's reply as plain data."""

    def download(self, run: str, file: str) -> bytes:
        """A file of a run."""


def of_coordinator(client: RunsApi, run: str) -> RunCurves:
    """The curves of a coordinator's run, through its admin API. Raises what the coordinator names."""
    row = client.call("GetRun", client.messages.RunRef(run=run))
    signed = json.loads(client.download(run, "plan.json"))
    lines = client.download(run, "events.jsonl").splitlines()
    facts = RunFacts(
        run=run,
        name=row["name"],
        purpose=row["purpose"],
        state=row["state"],
        round=row["round"],
        rounds=row["rounds"],
        proposed_at=row["proposed_at"],
        plan_sha256=row["plan_sha256"],
        plan=json.loads(signed["plan"]),
    )
    return collect(facts, [json.loads(line) for line in lines])


def collect(facts: RunFacts, rows: Sequence[Row]) -> RunCurves:
    """Curves of a run's events; a round that was begun again counts as it ended."""
    found: dict[str, dict[int, Point]] = {}
    view = RunView(facts.run)
    for row in rows:
        event = parse(row)
        view.add(event)
        if isinstance(event, RoundStarted):
            for curve in found.values():
                for number in [n for n in curve if n >= event.round]:
                    del curve[number]
        for name, value in _told(event):
            if value is not None and math.isfinite(value):
                number = int(getattr(event, "round", 0))
                found.setdefault(name, {})[number] = Point(number, event.time, float(value))
    times = {p.round: p.time for p in found.get("round/bytes_up", {}).values()}
    for site, spent in Spending().curves(facts, view, wait=True).items():
        found[f"epsilon/{site}"] = {n: Point(n, times[n], v) for n, v in spent if n in times}
    return RunCurves(
        facts=facts,
        curves={name: [c[n] for n in sorted(c)] for name, c in sorted(found.items()) if c},
        began=float(rows[0]["time"]) if rows else None,
        ended=float(rows[-1]["time"]) if rows else None,
    )


def _told(event: Any) -> Iterator[tuple[str, float | None]]:
    """Names and values that one event adds to curves."""
    if isinstance(event, RoundFinished):
        for key in _PER_ROUND:
            yield f"round/{key}", getattr(event, key)
        yield "round/update_norm", event.update_norm
    elif isinstance(event, Evaluated):
        stem = f"{event.view}/{event.split or 'held-out'}"
        for metric, value in event.pooled.items():
            yield f"{stem}/{metric}", value


INSTALL_MLFLOW = "pip install 'silotune[mlflow]'"
STORE = "mlflow.db"
"""Name of the file: ``mlflow ui --backend-store-uri sqlite:///DIR/mlflow.db``."""

_BATCH = 500  # MLflow takes 1000 metrics and 100 parameters at a time
_PARAMETERS = 100
_LONGEST = 500  # characters of a parameter
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def write_mlflow(run: RunCurves, out: Path) -> Path:
    """Add a run to the store in `out`, under an experiment of the plan's name; the store's file.

    Raises
    ------
    ExtraMissing
        MLflow is not installed.
    ExportInTheWay
        The store has a run of this name.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would call home on import
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
    except ImportError as exc:
        raise ExtraMissing("MLflow is not installed", remedy=INSTALL_MLFLOW) from exc
    out.mkdir(parents=True, exist_ok=True)
    path = out / STORE
    client = MlflowClient(tracking_uri=f"sqlite:///{path.resolve()}")
    number = _begin(client, run, out)
    names = _allowed(run.curves)
    metrics = [
        Metric(names[curve], point.value, _milliseconds(point.time), point.round)
        for curve, points in run.curves.items()
        for point in points
    ]
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(number, metrics=metrics[start : start + _BATCH])
    settings = [Param(key, value[:_LONGEST]) for key, value in run.settings.items()]
    for start in range(0, len(settings), _PARAMETERS):
        client.log_batch(number, params=settings[start : start + _PARAMETERS])
    status = _STATUS.get(run.facts.state)
    if status:
        client.set_terminated(number, status=status, end_time=_milliseconds(run.ended))
    return path


def _begin(client: Any, run: RunCurves, out: Path) -> str:
    """A new run in the plan's experiment; its id."""
    name = run.facts.name
    known = client.get_experiment_by_name(name)
    artifacts = (out / "artifacts").resolve().as_uri()
    experiment = (
        known.experiment_id
        if known
        else client.create_experiment(name, artifact_location=artifacts)
    )
    wanted = f"tags.mlflow.runName = '{run.facts.run}'"
    if client.search_runs([experiment], filter_string=wanted, max_results=1):
        raise ExportInTheWay(f"{out / STORE} has a run {run.facts.run}")
    began = client.create_run(
        experiment, start_time=_milliseconds(run.began), run_name=run.facts.run
    )
    client.set_tag(began.info.run_id, "mlflow.note.content", run.facts.purpose[:_LONGEST])
    return str(began.info.run_id)


def _allowed(curves: Iterable[str]) -> dict[str, str]:
    """Each curve's name in the characters that MLflow takes; two curves never share one."""
    found: dict[str, str] = {}
    for curve in curves:
        name = stem = re.sub(r"[^0-9A-Za-z_\-. /]", "_", curve)[:240]
        number = 1
        while name in found.values():
            number += 1
            name = f"{stem}-{number}"
        found[curve] = name
    return found


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(1000 * seconds)


INSTALL_TENSORBOARD = "pip install 'silotune[tensorboard]'"


def write_tensorboard(run: RunCurves, out: Path) -> Path:
    """Write a run into a folder of its own under `out`; that folder.

    Raises
    ------
    ExtraMissing
        TensorBoard is not installed.
    ExportInTheWay
        The run's folder holds something.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as exc:
        raise ExtraMissing("TensorBoard is not installed", remedy=INSTALL_TENSORBOARD) from exc
    folder = out / run.facts.run
    if folder.exists() and any(folder.iterdir()):
        raise ExportInTheWay(f"{folder} is not empty")
    with SummaryWriter(str(folder)) as writer:
        for name, points in run.curves.items():
            for point in points:
                writer.add_scalar(name, point.value, point.round, walltime=point.time)
        text = json.dumps(run.settings, indent=2, sort_keys=True)
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown's code block
        writer.add_text("plan", indented, 0, walltime=run.began)
    return folder
