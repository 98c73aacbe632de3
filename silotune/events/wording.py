"""An event in one line, for terminals and logs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

_TOLD_APART = ("id", "time", "event")


def in_a_line(event: Mapping[str, Any], *, hidden: Collection[str] = ()) -> str:
    """Time, kind, and every field that says something, but for the `hidden` ones."""
    fields = "  ".join(
        f"{key}={_short(value)}"
        for key, value in event.items()
        if key not in _TOLD_APART and key not in hidden and value not in ("", None)
    )
    when = f"{datetime.fromtimestamp(event['time'], UTC):%H:%M:%S}"
    return f"{when}  {event['event']:<15} {fields}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value)
