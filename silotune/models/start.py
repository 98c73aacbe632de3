"""An adapter of an earlier run as the start of another: found, compared, and known by its hash.

Sites need not have it. It is what the coordinator sends in the first round, as it sends every other
round's adapter, and a site's guarantee holds whatever is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from silotune.errors import AdapterMismatch
from silotune.models.layout import Layout, Vector, arrays_sha256, initial_adapter
from silotune.plan.plan import Plan
from silotune.plan.sections import StartSection

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Earlier:
    """A finished adapter: the plan that it was trained by, and its arrays by name."""

    plan: Plan
    arrays: Arrays


FindStart = Callable[[StartSection], Earlier]


def in_folder(start: StartSection) -> Earlier:
    """The adapter of a run's directory on this machine, or of its own folder.

    Raises
    ------
    AdapterMismatch
        There is none, or it is none of ours.
    """
    folder = Path(start.adapter).expanduser()
    final = folder / "adapters" / "final"
    folder = final if final.is_dir() else folder
    if not folder.is_dir():
        raise AdapterMismatch(
            f"lora.start.adapter: {folder} is no folder here",
            remedy="Give the directory of a finished run, or an adapter's own folder.",
        )
    # A coordinator that starts from its own runs needs no PyTorch.
    from silotune.models.adapter import folder_arrays, read_plan

    return Earlier(read_plan(folder), folder_arrays(folder))


def require_start(plan: Plan, *, find: FindStart = in_folder) -> Earlier | None:
    """The adapter that a plan starts from, if it names one that this plan can go on with.

    Raises
    ------
    AdapterMismatch
        It is not there, has another hash, or was trained on another model, scale, task or head.
    """
    start = plan.lora.start
    if start is None:
        return None
    earlier = find(start)
    if (found := arrays_sha256(earlier.arrays)) != start.sha256:
        raise AdapterMismatch(
            f"lora.start.sha256: the adapter has {found}, the plan {start.sha256}"
        )
    theirs, ours = _identity(earlier.plan), _identity(plan)
    if other := sorted(
        key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)
    ):
        raise AdapterMismatch(
            f"lora.start: the earlier run has another {', '.join(other)} than this plan"
        )
    return earlier


def start_adapter(layout: Layout, plan: Plan, *, find: FindStart = in_folder) -> Vector:
    """Where a run starts: from the adapter that the plan names, or else from `initial_adapter`.

    Raises
    ------
    AdapterMismatch
        As `require_start`, or its arrays are others than the layout's.
    """
    earlier = require_start(plan, find=find)
    if earlier is None:
        return initial_adapter(layout, plan)
    names = {entry.name for entry in layout.entries}
    extra = sorted(name for name in earlier.arrays if ".lora_" in name and name not in names)
    if extra:
        raise AdapterMismatch(f"lora.start: the earlier run adapts other layers, too: {extra[0]}")
    return layout.pack({name: a for name, a in earlier.arrays.items() if name in names})


def _identity(plan: Plan) -> dict[str, Any]:
    """All that an adapter's numbers mean something by."""
    lora, model = plan.lora, plan.model
    kept = ("task", "labels", "pooling", "centre_texts", "feature_scale", "head_features", "chat")
    weights = "sha256" if model.sha256 else "base"
    return {
        f"model.{weights}": getattr(model, weights),
        "lora.r": lora.r,
        "lora.alpha": lora.alpha,
        "lora.scaling": lora.scaling,
        **{f"model.{key}": getattr(model, key) for key in kept},
    }
