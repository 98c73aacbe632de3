"""The table and the picture of docs/strategies.md, from the results of benchmarks/strategies.py.

    python benchmarks/strategies_page.py benchmarks/results/strategies.json

Rewrites what stands between the two markers of the page; everything else on it is written by hand.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE = Path(__file__).parents[1] / "docs" / "strategies.md"
PICTURE = PAGE.parent / "images" / "strategies.png"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
BUDGETS = {"None": "none", "8.0": "ε = 8", "2.0": "ε = 2"}
COLUMNS = [(e, s) for e in BUDGETS for s in ("1", "4")]
SPLITS = {"hospitals": "hospitals (non-IID)", "iid": "dealt at random (IID)"}

Results = dict[str, dict[str, float]]
Cells = dict[tuple[str, str, str, str], list[float]]


def cells(found: Results, field: str) -> Cells:
    """Values by method, epsilon, steps and split, one a seed."""
    made: Cells = defaultdict(list)
    for key, values in found.items():
        if not key.startswith("base rate"):
            method, epsilon, steps, split, _ = key.split("|")
            if field in values:
                made[method, epsilon, steps, split].append(values[field])
    return made


def shown(values: list[float] | None) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def table(found: Results, split: str) -> list[str]:
    scores, personal = cells(found, "f1"), cells(found, "f1_personal")
    heads = [f"{BUDGETS[e]}, {s} step{'s' * (s != '1')}" for e, s in COLUMNS]
    methods = list(dict.fromkeys(key[0] for key in scores if key[3] == split))
    base = found[f"base rate|{split}"]["f1"]
    lines = [
        f"**{SPLITS[split]}**, test macro-F1; always the most frequent class: {base:.3f}",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for method in methods:
        row = [shown(scores.get((method, e, s, split))) for e, s in COLUMNS]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
        if any((method, e, s, split) in personal for e, s in COLUMNS):
            row = [shown(personal.get((method, e, s, split))) for e, s in COLUMNS]
            lines.append(f"| {method}, each site's own | " + " | ".join(row) + " |")
    return [*lines, ""]


def costs(found: Results) -> list[str]:
    """Bytes of a site and round over the whole run, and the coordinator's time."""
    up, down, server = (cells(found, field) for field in ("up", "down", "server_ms"))
    lines = ["| | kB up | kB down | coordinator, ms a round |", "|---|---|---|---|"]
    seen = set()
    for key in up:
        if key[0] not in seen:
            seen.add(key[0])
            kilo = [statistics.fmean(c[key]) / 1000 for c in (up, down)]
            own = [v for k, vs in server.items() if k[0] == key[0] for v in vs]
            lines.append(
                f"| {key[0]} | {kilo[0]:.1f} | {kilo[1]:.1f} | {statistics.median(own):.1f} |"
            )
    return [*lines, ""]


def draw(found: Results) -> None:
    scores = cells(found, "f1")
    panels = [(split, steps) for split in SPLITS for steps in ("1", "4")]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
    for axis, (split, steps) in zip(axes.flat, panels, strict=True):
        mine = {k: v for k, v in scores.items() if k[3] == split and k[2] == steps}
        methods = list(dict.fromkeys(key[0] for key in mine))[::-1]
        for (epsilon, label), colour, shift in zip(
            BUDGETS.items(), ("#444444", "#2a78b8", "#d9822b"), (0.22, 0.0, -0.22), strict=True
        ):
            places = [
                (y + shift, mine[m, epsilon, steps, split])
                for y, m in enumerate(methods)
                if (m, epsilon, steps, split) in mine
            ]
            for y, values in places:
                axis.plot([min(values), max(values)], [y, y], color=colour, linewidth=1.5)
            means = [statistics.fmean(values) for _, values in places]
            axis.plot(means, [y for y, _ in places], "o", color=colour, markersize=5, label=label)
            probe = mine.get(("probe", epsilon, steps, split))
            if probe:
                axis.axvline(statistics.fmean(probe), color=colour, linewidth=0.8, linestyle=":")
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
    lines = [line for split in SPLITS for line in table(found, split)] + costs(found)
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"{END}{after}", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
