"""The table and the picture of docs/strategies.md, from the results of benchmarks/strategies.py.

    python benchmarks/strategies_page.py benchmarks/results/strategies.json

Rewrites what stands between the two markers of the page; everything else on it is written by hand.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import matplotlib
from strategies_grid import METHODS, POISONED, ROBUST, SEVERAL, WRAPPERS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE = Path(__file__).parents[1] / "docs" / "strategies.md"
PICTURE = PAGE.parent / "images" / "strategies.png"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
BUDGETS = {"None": "none", "8.0": "ε = 8", "2.0": "ε = 2"}
COLUMNS = [(e, s) for s in ("1", "4") for e in BUDGETS]
HEADS = [f"{BUDGETS[e]}, {s} step{'s' * (s != '1')}" for e, s in COLUMNS]
SPLITS = {"hospitals": "Hospitals as they are (non-IID)", "iid": "Dealt at random (IID)"}
POISONABLE = {**SPLITS, "alike": "Dealt at random, all records in each step, head alone"}
PAIRS = [("fedavg", "probe"), *((m, "fedavg") for m in ("ffa", "rolora", "fedsvd", "fedsa"))]

Results = dict[str, dict[str, float]]
Cell = dict[str, float]
Cells = dict[tuple[str, str, str, str], Cell]


def cells(found: Results, field: str) -> Cells:
    """Values by method, epsilon, steps and split, and in each of these by seed."""
    made: Cells = defaultdict(dict)
    for key, values in found.items():
        if not key.startswith("base rate") and field in values:
            method, epsilon, steps, split, seed = key.split("|")
            made[method, epsilon, steps, split][seed] = values[field]
    return made


def most_seeds(found: Results) -> int:
    return max((len(cell) for cell in cells(found, "f1").values()), default=0)


def ordered(names: Iterable[str]) -> list[str]:
    """Methods in the order of the grid."""
    known = list(dict.fromkeys([*METHODS, *SEVERAL, *WRAPPERS, *ROBUST]))
    return sorted(set(names), key=known.index)


def shown(cell: Cell | None, *, seeds: int, sign: str = "") -> str:
    """Mean and standard deviation over the seeds; how many there are, unless it is all of them."""
    if not cell:
        return "-"
    values = list(cell.values())
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    fewer = f" ({len(values)})" if len(values) < seeds else ""
    return f"{statistics.fmean(values):{sign}.3f}{spread}{fewer}"


def rows(lines: dict[str, list[str]], heads: list[str]) -> list[str]:
    """A table, without its empty columns."""
    used = [n for n in range(len(heads)) if any(line[n] != "-" for line in lines.values())]
    made = ["| | " + " | ".join(heads[n] for n in used) + " |", "|---" * (len(used) + 1) + "|"]
    for name, line in lines.items():
        made.append(f"| {name} | " + " | ".join(line[n] for n in used) + " |")
    return [*made, ""]


def table(found: Results, split: str) -> list[str]:
    scores, personal = cells(found, "f1"), cells(found, "f1_personal")
    methods = ordered(key[0] for key in scores if key[3] == split)
    if not methods:
        return []
    seeds, lines = most_seeds(found), {}
    for method in methods:
        keys = [(method, e, s, split) for e, s in COLUMNS]
        lines[method] = [shown(scores.get(key), seeds=seeds) for key in keys]
        if any(key in personal for key in keys):
            own = [shown(personal.get(key), seeds=seeds) for key in keys]
            lines[f"{method}, each site's own"] = own
    base = found[f"base rate|{split}"]["f1"]
    title = f"**{SPLITS[split]}.** Test macro-F1; always the most frequent class: {base:.3f}"
    return [title, "", *rows(lines, HEADS)]


def differences(found: Results) -> list[str]:
    """What decides between methods: differences between trainings with the same seed."""
    scores, seeds, lines = cells(found, "f1"), most_seeds(found), {}
    for split, (one, other) in product(SPLITS, PAIRS):
        line = []
        for e, s in COLUMNS:
            mine, theirs = (scores.get((m, e, s, split), {}) for m in (one, other))
            both = {seed: mine[seed] - theirs[seed] for seed in mine if seed in theirs}
            line.append(shown(both, seeds=seeds, sign="+"))
        if set(line) != {"-"}:
            lines[f"{one} - {other}, {split}"] = line
    return [
        "**Differences in macro-F1** between trainings with the same seed",
        "",
        *rows(lines, HEADS),
    ]


def poisoned(found: Results) -> list[str]:
    """The robust rules with and without two liars of seven."""
    scores, seeds, made = cells(found, "f1"), most_seeds(found), []
    for split, title in POISONABLE.items():
        lines = {}
        for method in ordered(key[0] for key in scores if key[3] == split + POISONED):
            clean, lied = (
                scores.get((method, "None", "1", s), {}) for s in (split, split + POISONED)
            )
            lost = {seed: lied[seed] - clean[seed] for seed in lied if seed in clean}
            line = [shown(cell, seeds=seeds) for cell in (clean, lied)]
            lines[method] = [*line, shown(lost, seeds=seeds, sign="+")]
        if lines:
            heads = ["clean", "poisoned", "difference"]
            made += [
                f"**Two of the seven poisoned. {title}**, without privacy, one step a round",
                "",
            ]
            made += rows(lines, heads)
    return made


def costs(found: Results) -> list[str]:
    """Bytes of a site and round over the whole run, and the coordinator's time."""
    up, down, server = (cells(found, field) for field in ("up", "down", "server_ms"))
    lines = {}
    for method in ordered(key[0] for key in up if key[3] in SPLITS):
        mine = [key for key in up if key[0] == method and key[3] in SPLITS]
        kilo = [statistics.fmean(c[mine[0]].values()) / 1000 for c in (up, down)]
        times = [value for key in mine for value in server[key].values()]
        lines[method] = [f"{kilo[0]:.1f}", f"{kilo[1]:.1f}", f"{statistics.median(times):.1f}"]
    title = (
        "**Costs** of a site in a round (mean over all rounds, those of the head alone included)"
    )
    return [title, "", *rows(lines, ["kB up", "kB down", "coordinator, CPU ms a round"])]


def draw(found: Results) -> None:
    scores = cells(found, "f1")
    done = {(key[3], key[2]) for key in scores}
    panels = [panel for panel in product(SPLITS, ("1", "4")) if panel in done]
    down, across = -(-len(panels) // 2), min(2, len(panels))
    size = (2 + 4.5 * across, 4.0 * down)
    figure, axes = plt.subplots(
        down, across, figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (split, steps) in zip(axes.flat, panels, strict=False):
        mine = {k: v for k, v in scores.items() if k[3] == split and k[2] == steps}
        methods = ordered(key[0] for key in mine)[::-1]
        for (epsilon, label), colour, shift in zip(
            BUDGETS.items(), ("#444444", "#2a78b8", "#d9822b"), (0.22, 0.0, -0.22), strict=True
        ):
            places = [
                (y + shift, list(mine[m, epsilon, steps, split].values()))
                for y, m in enumerate(methods)
                if (m, epsilon, steps, split) in mine
            ]
            for y, values in places:
                axis.plot([min(values), max(values)], [y, y], color=colour, linewidth=1.5)
            means = [statistics.fmean(values) for _, values in places]
            axis.plot(means, [y for y, _ in places], "o", color=colour, markersize=5, label=label)
            probe = mine.get(("probe", epsilon, steps, split))
            if probe:
                axis.axvline(
                    statistics.fmean(probe.values()), color=colour, linewidth=0.8, linestyle=":"
                )
        axis.set_ylim(-0.6, len(methods) - 0.4)
        axis.set_yticks(range(len(methods)), methods, fontsize=8)
        axis.set_title(f"{SPLITS[split]}, {steps} local step{'s' * (steps != '1')}", fontsize=10)
        axis.grid(axis="x", linewidth=0.3)
    axes[0, 0].legend(fontsize=8, title="privacy")
    figure.supxlabel("test macro-F1: mean and range over seeds; dotted: the head-only probe")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    found: Results = json.loads(Path(sys.argv[1]).read_text())
    draw(found)
    seeds = most_seeds(found)
    lines = [
        f"Mean ± standard deviation; seeds: {seeds}, or as many as stand in brackets.",
        "",
        "![Macro-F1 of every strategy without privacy, at ε = 8 and at ε = 2](images/strategies.png)",
        "",
        *(line for split in SPLITS for line in table(found, split)),
        *differences(found),
        *poisoned(found),
        *costs(found),
    ]
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"{END}{after}", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
