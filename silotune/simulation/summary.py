"""A run in a few numbers: ``silotune report --json``, and the table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from silotune.simulation.figures import Metric, SiteRow, Summary, summarise
from silotune.simulation.run_directory import jsonable
from silotune.simulation.run_record import read_beside, read_record
from silotune.simulation.verdict import verdict
from silotune.simulation.wording import DASH, epsilon, printable, score, signed

_MOST_SITES = 12
_EPSILON = "\N{GREEK SMALL LETTER EPSILON}"


def summary(run_dir: Path, *, beside: Sequence[Path] = ()) -> dict[str, Any]:
    """Summarise a run, finished or not, as plain JSON data.

    Returns
    -------
    dict
        The fields of `silotune.simulation.figures.Summary`, and ``verdict``: its sentences.

    Raises
    ------
    RunDirectoryInvalid
        The folder is no run, or one of its files is damaged.
    """
    record = read_record(run_dir)
    found = summarise(record, beside=read_beside(record, beside))
    plain = jsonable({**asdict(found), "verdict": verdict(found)})
    assert isinstance(plain, dict)
    return plain


def print_summary(run_dir: Path, console: Console) -> None:
    """Print methods, sites and the verdict, within the console's width.

    Raises
    ------
    RunDirectoryInvalid
        The folder is no run, or one of its files is damaged.
    """
    found = summarise(read_record(run_dir))
    if found.methods:
        console.print(_methods(found))
        console.print()
    if found.by_site and found.method("own"):
        console.print(_sites(found))
    if found.methods:
        console.print()
    if found.privacy.guarantee in {"none", "seeded"}:
        console.print(Text(f"NOT PRIVATE: {found.privacy.statement}", style="bold red"))
    for sentence in verdict(found):
        console.print(Text(sentence), soft_wrap=False)


def _methods(found: Summary) -> Table:
    metric = found.metric
    titles = ["accuracy"] if metric.key == "macro_f1" else ["perplexity"]
    table = _table(
        "all sites' held-out test data", [metric.title, *titles, "over own", _EPSILON, "s"]
    )
    for row in found.methods:
        table.add_row(
            Text(row.title),
            score(row.test.get(metric.key)),
            *(score(row.test.get(title)) for title in titles),
            signed(row.gain_over_own),
            epsilon(row.epsilon),
            DASH if row.seconds is None else f"{row.seconds:,.1f}",
            style="bold" if row.key == "federated" else "",
        )
    return table


_COLUMNS = (
    ("trivial", "trivial"),
    ("own", "own"),
    ("federated", "federated"),
    ("own head", "personal"),
)


def _sites(found: Summary) -> Table:
    """Each site at home, and the gain there (red where it is none) beside that on everybody's data."""
    columns = [(n, key) for n, key in _COLUMNS if any(getattr(r, key) for r in found.by_site)]
    names = [name for name, _ in columns]
    table = _table("each site's own test data", [*names, "at home", "on all"])
    shown = sorted(found.by_site, key=_gain)[:_MOST_SITES]
    for row in [site for site in found.by_site if site in shown]:
        scores = [score(_value(row, key, found.metric)) for _, key in columns]
        gains = [_signed(gain) for gain in (row.gain, row.gain_everywhere)]
        table.add_row(Text(printable(row.site)), *scores, *gains)
    if len(found.by_site) > len(shown):
        table.add_row(f"and {len(found.by_site) - len(shown)} with larger gains")
    return table


def _signed(gain: float | None) -> Text:
    return Text(signed(gain), style="red" if gain is not None and gain < 0 else "")


def _table(first: str, numbers: list[str]) -> Table:
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column(first, no_wrap=True, overflow="ellipsis", min_width=20)
    for name in numbers:
        table.add_column(name, no_wrap=True, justify="right", min_width=max(len(name), 6))
    return table


def _gain(row: SiteRow) -> float:
    return 0.0 if row.gain is None else row.gain


def _value(row: SiteRow, kind: str, metric: Metric) -> float | None:
    value = getattr(row, kind).get(metric.key)
    return None if value is None else float(value)
