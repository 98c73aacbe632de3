"""Whether a base model takes a plan, asked before anybody approves it or waits for it."""

from __future__ import annotations

from pathlib import Path

from silotune.errors import SilotuneError
from silotune.models.base import load_model
from silotune.models.outline import outline
from silotune.models.trial import Refusal, trial_key
from silotune.models.weights import locate, weight_files
from silotune.plan import Plan

# Weights of larger models are not loaded to answer a question; the site's own trial does it later.
_MOST_BYTES = 4_000_000_000
_ANSWERS: dict[str, Refusal | None] = {}


def require_taken(plan: Plan, *, base: str | None = None) -> None:
    """Check that a base model on this machine can be trained as a plan says; asked once a process.

    Names and numbers are compared without the weights. A model of up to 4 GB is loaded too, and tried
    as it is before training (`silotune.models.trial`).

    Parameters
    ----------
    plan : Plan
        What is to be trained.
    base : str, optional
        Where the base model is on this machine, if not where ``model.base`` says.

    Raises
    ------
    ModelNotFound
        It is not here.
    ModelError
        It can't; the message has the number, the nearest name or the layer.
    """
    folder = locate(base or plan.model.base)
    key = trial_key(plan, folder)
    if key not in _ANSWERS:
        _ANSWERS[key] = _asked(plan, folder)
    if (refusal := _ANSWERS[key]) is not None:
        raise refusal.error()


def _asked(plan: Plan, folder: Path) -> Refusal | None:
    try:
        outline(plan, base=str(folder))
        if sum(path.stat().st_size for path in weight_files(folder)) <= _MOST_BYTES:
            load_model(plan, base=str(folder), device="cpu", attention="eager", dtype="float32")
    except SilotuneError as exc:
        return Refusal.of(exc)
    return None
