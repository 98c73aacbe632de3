"""What the run page shows of a run that trains nothing: figures of statistics, and votes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from silotune.events.schema import STATISTICS_FORMAT, VOTES_FORMAT
from silotune.plan.voted import settings_in_words

DASH = "\N{EN DASH}"


def counted(found: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Figures of a statistics run: a heading, and group, figure and interval a row."""
    if found.get("format") != STATISTICS_FORMAT:
        return  # of another version
    floor = found["floor"]
    if found["units"] is not None:
        units = found["units"]
        row = (f"{found['unit']}s", f"{units['value']:,.0f}", _from_to(units, "{:,.0f}"))
        yield "All sites together", [row]
    if found["labels"] is not None:
        yield "Labels", [_share_row(row["label"], row["share"], floor) for row in found["labels"]]
    binned = {
        "Length of a text": found["lengths"],
        f"Records a {found['unit']}": found["records_a_unit"],
        **found["numbers"],
    }
    for heading, part in binned.items():
        if part is not None and part["bins"] is not None:
            yield heading, [_share_row(_group(row), row["share"], floor) for row in part["bins"]]


def voted(found: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Votes: a heading, and candidate, votes and their noise a row."""
    if found.get("format") != VOTES_FORMAT:
        return
    noise = f"\N{PLUS-MINUS SIGN} {found['noise']:.1f}"
    yield (
        f"Votes; chosen: candidate {found['chosen']}",
        [
            (
                f"{one['number']}: {settings_in_words(one['settings'])}",
                f"{one['votes']:,.1f}",
                noise,
            )
            for one in found["candidates"]
        ],
    )


def _share_row(name: str, share: Mapping[str, float] | None, floor: float) -> tuple[str, str, str]:
    if share is None:
        return name, f"under {floor:,.0f}", DASH
    return name, f"{share['value']:.1%}", _from_to(share, "{:.1%}")


def _from_to(estimate: Mapping[str, float], form: str) -> str:
    return f"{form.format(estimate['low'])} to {form.format(estimate['high'])}"


def _group(row: Mapping[str, Any]) -> str:
    if row["to"] is None:
        return f"{row['from']:g} or more"
    return f"{row['from']:g}" if row["from"] == row["to"] else f"{row['from']:g} to {row['to']:g}"
