"""Fine-tune one language model across organisations that may not pool their records.

From Python::

    import silotune

    run = silotune.simulate("hospitals/plan.toml")
    run.scores()
    silotune.load(run).predict(["chronic kidney disease, stage 4"])

Everything here is loaded when it is first used: to import the package imports no library.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from silotune.version import __version__

# Before any library reads them: silotune never phones home and never downloads unasked.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    from silotune.api.comparison import Comparison, compare
    from silotune.api.evaluating import EvaluatedModel, evaluate
    from silotune.api.explaining import explain
    from silotune.api.exporting import ExportedAdapter, export_adapter
    from silotune.api.model import Model, load
    from silotune.api.run import Run
    from silotune.api.simulating import resume, simulate
    from silotune.api.site import Site, partition
    from silotune.api.tuning import Tuned, tune
    from silotune.plan.plan import Plan

_HOME = {
    "Comparison": "api.comparison",
    "EvaluatedModel": "api.evaluating",
    "ExportedAdapter": "api.exporting",
    "Model": "api.model",
    "Plan": "plan.plan",
    "Run": "api.run",
    "Site": "api.site",
    "Tuned": "api.tuning",
    "compare": "api.comparison",
    "evaluate": "api.evaluating",
    "explain": "api.explaining",
    "export_adapter": "api.exporting",
    "load": "api.model",
    "partition": "api.site",
    "resume": "api.simulating",
    "simulate": "api.simulating",
    "tune": "api.tuning",
}

__all__ = [
    "Comparison",
    "EvaluatedModel",
    "ExportedAdapter",
    "Model",
    "Plan",
    "Run",
    "Site",
    "Tuned",
    "__version__",
    "compare",
    "evaluate",
    "explain",
    "export_adapter",
    "load",
    "partition",
    "resume",
    "simulate",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for, once."""
    if name not in _HOME:
        raise AttributeError(f"module 'silotune' has no attribute {name!r}")
    found = getattr(import_module(f"silotune.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__file__", "__name__", "__path__"]
