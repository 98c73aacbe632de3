"""Numbers and names as text for people: one rounding, one sign, one dash, in report and terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

DASH = "\N{EN DASH}"


def score(value: float | None) -> str:
    """A score with three decimals, or a dash."""
    return DASH if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference with its sign (a true minus), or a dash."""
    return DASH if value is None else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def epsilon(value: float | None) -> str:
    """An epsilon, rounded up so that print never understates it; a dash for None."""
    if value is None:
        return DASH
    return f"{math.ceil(value * 100 - 1e-6) / 100:.2f}"


def power(value: float | None) -> str:
    """A small probability such as delta: ``1e-5``."""
    return DASH if value is None else f"{value:g}".replace("e-0", "e-")


def plural(number: int, noun: str) -> str:
    """``1 site``, ``7 sites``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: Sequence[str], *, most: int = 8) -> str:
    """Names joined for a sentence; beyond `most` only counted."""
    shown = [printable(name) for name in names[:most]]
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return shown[0] if len(shown) == 1 else f"{'; '.join(shown[:-1])} and {shown[-1]}"


def quoted(text: str) -> str:
    """A name from outside in quotation marks, safe to show."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{printable(text)}\N{RIGHT DOUBLE QUOTATION MARK}"


def printable(text: str, *, most: int = 60) -> str:
    """A name from outside, safe to show: no control or direction marks, not endless."""
    shown = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    return shown if len(shown) <= most else shown[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def octets(number: float) -> str:
    """Bytes for a reader: ``76.8 kB``."""
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= divisor:
            return f"{number / divisor:.1f} {unit}"
    return f"{number:.0f} B"


def clock_time(seconds: float) -> str:
    """``0:07``, ``12:30`` or ``1:05:00``."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
