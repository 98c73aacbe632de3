"""The report of a statistics run: what was counted, how sure it is, and what it means for a plan.

Everything here is made of the content of statistics.json (`silotune.rounds.estimates`), which has
nothing that lies below the floor: there is nothing to hide again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from silotune.errors import RunDirectoryInvalid
from silotune.events.schema import STATISTICS_FORMAT
from silotune.percents import said_percent
from silotune.report.page import TextTable, Tile
from silotune.report.verdict import DASH, epsilon, plural, power, printable

Found = Mapping[str, Any]

ROUNDS = 300
"""That training is reckoned with."""

_EPSILONS, _RATES = (1.0, 3.0, 8.0), (0.02, 0.05, 0.1)


def read(path: Path) -> dict[str, Any]:
    """The content of a statistics.json.

    Raises
    ------
    RunDirectoryInvalid
        There is none, or it is of another format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise RunDirectoryInvalid(f"{path} is not a readable statistics.json") from exc
    if not isinstance(found, dict) or found.get("format") != STATISTICS_FORMAT:
        raise RunDirectoryInvalid(f"{path} is not of the format {STATISTICS_FORMAT!r}")
    return found


def sentences(found: Found) -> list[str]:
    """What is most worth knowing, in sentences."""
    unit, level = found["unit"], said_percent(found["confidence"])
    units = found["units"]
    told = [
        f"{plural(len(found['sites']), 'site')} have about {units['value']:,.0f} {unit}s together "
        f"({level} interval {units['low']:,.0f} to {units['high']:,.0f})."
        if units
        else f"The sites have fewer than {found['floor']:,.0f} {unit}s together."
    ]
    shares = [row for row in found["labels"] or () if row["share"]]
    if len(shares) > 1:
        rarest = min(shares, key=lambda row: row["share"]["value"])
        told.append(
            f"The rarest label shown is '{printable(rarest['label'])}', with "
            f"{_share(rarest['share'])} of them."
        )
    if lengths := found["lengths"]:
        told += _length_sentence(lengths)
    return told


def _length_sentence(lengths: Found) -> list[str]:
    (row,) = [row for row in lengths["quantiles"] if row["q"] == 0.95]
    if row["value"] is None:
        return []
    end = "or more" if row["high"] is None else f"to {row['high']:,.0f}"
    return [
        f"95% of the {lengths['of']}s have at most about {row['value']:,.0f} {lengths['counted']} "
        f"({row['low']:,.0f} {end})."
    ]


def tiles(found: Found) -> list[Tile]:
    """The numbers at the head of the page."""
    units = found["units"]
    value = f"{units['value']:,.0f}" if units else f"under {found['floor']:,.0f}"
    spread = f"± {units['high'] - units['value']:,.0f}" if units else ""
    worth = "not private: seeded" if not found["private"] else f"δ = {power(found['delta'])}"
    return [
        Tile(f"{found['unit']}s, all sites", value, spread, "federated"),
        Tile("sites", f"{len(found['sites'])}", "in the sums"),
        Tile(
            "ε of this run", epsilon(found["epsilon"]), worth, "" if found["private"] else "worse"
        ),
        Tile("noise of a count", f"± {found['noise']:,.1f}", "one standard deviation"),
    ]


def tables(found: Found) -> Iterator[tuple[str, str, TextTable]]:
    """Every histogram: a name, a heading and a table."""
    for name, heading, rows in histograms(found):
        shown = [(label, *_cells(share, found["floor"])) for label, share in rows]
        yield name, heading, TextTable(("group", "share", "interval"), tuple(shown))


def histograms(found: Found) -> Iterator[tuple[str, str, list[tuple[str, Found | None]]]]:
    """Every histogram: a name, a heading, and groups with their shares."""
    unit = found["unit"]
    if found["labels"] is not None:
        rows = [(printable(row["label"]), row["share"]) for row in found["labels"]]
        yield "labels", "Labels", rows
    if (sizes := found["records_a_unit"]) is not None:
        yield "records", f"Records a {unit} has", _grouped(sizes["bins"], whole=True)
    if (lengths := found["lengths"]) is not None:
        counted = lengths["counted"]
        yield (
            "lengths",
            f"Length of a {lengths['of']}, in {counted}",
            _grouped(lengths["bins"], whole=True),
        )
    for name, number in found["numbers"].items():
        if number["bins"] is not None:
            yield f"number-{name}", printable(name), _grouped(number["bins"], whole=False)


def _grouped(bins: Sequence[Found], *, whole: bool) -> list[tuple[str, Found | None]]:
    return [(_group(row["from"], row["to"], whole=whole), row["share"]) for row in bins]


def _group(low: float, high: float | None, *, whole: bool) -> str:
    if high is None:
        return f"{low:,g} or more"
    if whole and low == high:
        return f"{low:,g}"
    return f"{low:,g} to {high:,g}"


def _share(share: Found) -> str:
    return f"{share['value']:.1%}"


def _cells(share: Found | None, floor: float) -> tuple[str, str]:
    if share is None:
        return f"under {floor:,.0f}", DASH
    return _share(share), f"{share['low']:.1%} to {share['high']:.1%}"


def quantile_table(found: Found) -> TextTable | None:
    """Quantiles of everything that has some; their intervals end at edges of groups."""
    named: list[tuple[str, Sequence[Found]]] = []
    if found["lengths"] is not None:
        named.append(
            (
                f"{found['lengths']['of']}, {found['lengths']['counted']}",
                found["lengths"]["quantiles"],
            )
        )
    if found["records_a_unit"] is not None:
        named.append((f"records a {found['unit']}", found["records_a_unit"]["quantiles"]))
    named += [(printable(n), r["quantiles"]) for n, r in found["numbers"].items() if r["quantiles"]]
    if not named:
        return None
    rows = [
        (said_percent(row["q"]), *(_quantile(quantiles[place]) for _, quantiles in named))
        for place, row in enumerate(named[0][1])
    ]
    return TextTable(("quantile", *(name for name, _ in named)), tuple(rows))


def _quantile(row: Found) -> str:
    if row["value"] is None:
        return DASH
    end = "…" if row["high"] is None else f"{row['high']:,g}"
    return f"{row['value']:,.3g} ({row['low']:,g} to {end})"


def mean_table(found: Found) -> TextTable | None:
    """Means of numbers, within their declared bounds."""
    rows = [
        (printable(name), f"{row['lower']:,g} to {row['upper']:,g}", *_mean(row, found["floor"]))
        for name, row in found["numbers"].items()
    ]
    head = ("number", "bounds", f"{found['unit']}s that have it", "mean", "interval")
    return TextTable(head, tuple(rows)) if rows else None


def _mean(row: Found, floor: float) -> tuple[str, str, str]:
    units, mean = row["units"], row["mean"]
    if units is None or mean is None:
        return f"under {floor:,.0f}", DASH, DASH
    return (
        f"{units['value']:,.0f}",
        f"{mean['value']:,.4g}",
        f"{mean['low']:,.4g} to {mean['high']:,.4g}",
    )


def training_table(found: Found) -> TextTable | None:
    """What training on so many units would cost, by rate and epsilon, in `ROUNDS` rounds."""
    if not found["units"]:
        return None
    units = found["units"]["value"]
    rows = []
    for rate in _RATES:
        noises = [_noise_for(target, found["delta"], rate) for target in _EPSILONS]
        shown = [f"{noise:.2f} ({noise / (rate * units):.2g})" for noise in noises]
        rows.append((f"{rate:g}", f"{rate * units:,.0f}", *shown))
    head = ("rate", f"{found['unit']}s a step", *(f"noise at ε = {e:g}" for e in _EPSILONS))
    return TextTable(head, tuple(rows))


@lru_cache(maxsize=64)
def _noise_for(target: float, delta: float, rate: float) -> float:
    from silotune.privacy.accounting import calibrate  # it takes a second to import

    return calibrate(epsilon=target, delta=delta, rate=rate, steps=ROUNDS)


def print_statistics(found: Found, console: Console) -> None:
    """Print every figure, within the console's width."""
    if not found["private"]:
        console.print(Text("NOT PRIVATE: seeded", style="bold red"))
    for _, heading, table in tables(found):
        console.print(_printed(heading, table))
        console.print()
    for heading, more in (("quantile", quantile_table(found)), ("mean", mean_table(found))):
        if more is not None:
            console.print(_printed(heading, more))
            console.print()
    for sentence in sentences(found):
        console.print(Text(sentence), soft_wrap=False)
    console.print(
        f"ε = {epsilon(found['epsilon'])} at δ = {power(found['delta'])}; a group is shown from "
        f"{found['floor']:,.0f} {found['unit']}s on."
    )


def _printed(heading: str, table: TextTable) -> Table:
    made = Table(box=None, padding=(0, 1), show_edge=False)
    made.add_column(heading if table.head[0] == "group" else table.head[0], min_width=20)
    for name in table.head[1:]:
        made.add_column(name, justify="right")
    for row in table.rows:
        made.add_row(*map(Text, row))
    return made
