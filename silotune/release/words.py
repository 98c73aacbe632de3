"""What a control is, in words; signed statements hold none."""

from __future__ import annotations

from collections.abc import Mapping

from silotune.release.statement import Control, ControlName, Holder

_ASKS: Mapping[ControlName, str] = {
    "adapter": "complete, in PEFT's own format, and nothing in it runs when it is read",
    "plan": "private, not seeded, and the plan that was run",
    "certificates": "each site that contributed certified its cost, within the plan",
    "audit": "the one-run audit's lower bound is not above its claim",
    "membership": "an attack on the adapter shows no more than the plan's epsilon",
    "memorisation": "planted canaries are not exposed beyond the bound, none is completed",
    "signature": "a named person with a role and a key says so",
}
_HOLDERS: Mapping[Holder, str] = {
    "engineer": "ML engineer",
    "sites": "each site",
    "consortium": "consortium",
    "person": "a named person",
}


def asks(control: Control) -> str:
    """What a control asks for."""
    return _ASKS[control.name]


def holder(control: Control) -> str:
    """Who holds it."""
    return _HOLDERS[control.held_by]


def verdict(control: Control) -> str:
    """Passed, not passed, or why it does not apply."""
    if control.passed is None:
        return "does not apply"
    if control.passed:
        return "passed"
    if control.name in {"audit", "membership", "memorisation"} and not measured(control):
        return "NOT DONE: run the attacks (simulate --attack)"
    return "NOT PASSED"


def measured(control: Control) -> bool:
    """Whether an attack left a figure to compare."""
    return any(name in control.figures for name in ("lower_bound", "most_exposure_bits"))


def figures(control: Control) -> str:
    """The numbers that were compared."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.6g}" for name, value in control.figures.items()
    )
