"""A vote for people: a table of the candidates, sentences, and the figures as they are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from silotune.errors import RunDirectoryInvalid
from silotune.events.schema import VOTES_FORMAT
from silotune.percents import likelihood
from silotune.plan.voted import settings_in_words
from silotune.report.page import TextTable
from silotune.report.verdict import epsilon, plural, power, printable

Found = Mapping[str, Any]

_UNSURE = 0.9
_CHOICE = {"plan", "settings", "chosen", "epsilon"}  # without which nothing is chosen


def read(path: Path) -> dict[str, Any]:
    """What a votes.json says. Raises `RunDirectoryInvalid` if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] == VOTES_FORMAT and found.keys() >= _CHOICE:
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RunDirectoryInvalid(f"{path} is no votes.json of this version")


def table(found: Found) -> TextTable:
    """The candidates, the most voted for first."""
    by_votes = sorted(found["candidates"], key=lambda one: -one["votes"])
    rows = [
        (str(one["number"]), printable(settings_in_words(one["settings"])), f"{one['votes']:,.1f}")
        for one in by_votes
    ]
    return TextTable(("candidate", "settings", "votes"), tuple(rows))


def sentences(found: Found) -> list[str]:
    """What came of it, and how far it can be trusted."""
    known = [site["blocks"] for site in found["sites"].values() if site["blocks"]]
    told = [
        f"Chosen: candidate {found['chosen']}, {printable(settings_in_words(found['settings']))}.",
        f"{plural(sum(known), 'block')} of {plural(len(found['sites']), 'site')} voted; a number of "
        f"votes has noise of {found['noise']:.1f} (one standard deviation).",
        f"Probability that it has the most votes without noise too: {likelihood(found['probability'])}, "
        "if no outcome was likelier than another before the vote. That says how well the votes were "
        "counted, and not how well the candidate will do.",
    ]
    if found["probability"] < _UNSURE:
        told.append(
            "The first places are too close for the noise: take it as one of the good ones, not as the "
            "best. More units, fewer candidates or a larger epsilon make it surer."
        )
    return told


def cost(found: Found) -> str:
    """What it cost each unit."""
    return (
        f"ε = {epsilon(found['epsilon'])} at δ = {power(found['delta'])} for each {found['unit']}, "
        "charged to every site's ledger; training by the plan adds its own."
    )


def print_votes(found: Found, console: Console) -> None:
    """Print the votes, within the console's width."""
    if not found["private"]:
        console.print(Text("NOT PRIVATE: seeded", style="bold red"))
    made = Table(box=None, padding=(0, 1), show_edge=False)
    shown = table(found)
    for name in shown.head:
        made.add_column(name, overflow="fold", justify="left" if name == "settings" else "right")
    for row in shown.rows:
        made.add_row(*map(Text, row))
    console.print(made)
    console.print()
    for sentence in (*sentences(found), cost(found)):
        console.print(Text(sentence))
