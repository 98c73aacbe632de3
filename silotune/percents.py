"""Shares for a reader, as percentages: what is not all or nothing never reads as if it were."""

from __future__ import annotations


def percent(share: float) -> str:
    """A share of what was counted: ``83%``, ``99.6%``, ``above 99.9%``, and ``100%`` of all only."""
    return f"{share:.0%}" if share in (0.0, 1.0) else likelihood(share)


def likelihood(probability: float) -> str:
    """A probability that was computed: as `percent`, and never ``0%`` or ``100%``."""
    shown = f"{probability:.0%}"
    if shown in ("0%", "100%"):
        shown = f"{probability:.1%}"
    return {"0.0%": "under 0.1%", "100.0%": "above 99.9%"}.get(shown, shown)


def said_percent(share: float) -> str:
    """A share that somebody chose, such as a plan's or a level of confidence, with all its digits."""
    return f"{100.0 * share:.10g}%"
