"""What a doctor finds, of a site or a coordinator: checks one by one, each trouble with its code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from silotune.errors import SilotuneError

Check = tuple[str, Callable[[], str]]
"""What is looked at, and what looks: it says what it found, or raises."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes
    ----------
    check : str
        What was looked at.
    state : str
        ``ok``, ``failed`` or ``skipped``.
    detail : str
        What was found.
    code, remedy : str
        Of the error, if it failed.
    """

    check: str
    state: str
    detail: str
    code: str = ""
    remedy: str = ""


class Skipped(Exception):
    """The ground of a check is missing."""


def examine(checks: Iterable[Check]) -> list[Finding]:
    """Make every check, in order."""
    return [_look(name, check) for name, check in checks]


def _look(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", check())
    except Skipped as exc:
        return Finding(name, "skipped", str(exc))
    except SilotuneError as exc:
        return Finding(name, "failed", exc.detail, exc.code, exc.remedy)
    except Exception as exc:
        # Never the message of a foreign error: it may quote a record.
        detail = type(exc).__name__
        return Finding(name, "failed", detail, SilotuneError.code, SilotuneError.advice)
