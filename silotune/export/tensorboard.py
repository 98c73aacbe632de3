"""Curves as TensorBoard's event files: ``tensorboard --logdir DIR`` shows them."""

from __future__ import annotations

import json
from pathlib import Path

from silotune.events.errors import ExtraMissing
from silotune.export.curves import RunCurves
from silotune.export.errors import ExportInTheWay

INSTALL = "pip install 'silotune[tensorboard]'"


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
        raise ExtraMissing("TensorBoard is not installed", remedy=INSTALL) from exc
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
