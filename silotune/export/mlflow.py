"""Curves as an MLflow tracking store: one SQLite file that ``mlflow ui`` opens.

A folder of files, MLflow's older store, is in maintenance mode and is refused by its current versions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from silotune.events.errors import ExtraMissing
from silotune.export.curves import RunCurves
from silotune.export.errors import ExportInTheWay

INSTALL = "pip install 'silotune[mlflow]'"
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
        raise ExtraMissing("MLflow is not installed", remedy=INSTALL) from exc
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
