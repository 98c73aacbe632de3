"""Who reaches what under privacy, on every task, with numbers by rule only: test macro-F1.

Tasks: the hospitals demo by ``code`` and by ``category``, and the ``bank`` demo. Each is trained with
the demo's plan of required keys, through the package's own trainers and server; nothing is tuned here.
Methods:

- own: each site alone, the head by rule: mean of the sites' models on everybody's records
- probe: the federation, a linear head on frozen features
- cosines: the same through random cosines
- lora: an adapter in the last rounds and a linear head; both: the same through random cosines
- pooled: one trainer with all records, the head by rule; pooled_lora: an adapter, too

Budgets are epsilons, or ``none``. Noise: ``shared`` (each site adds its share), ``local`` (each adds
all of its own), and both with ``_bands``: correlated over 8 rounds (`privacy.bands`) under SGD with
momentum. With --folder every cell is kept in its cells.json at once,
and the same command goes on where it was stopped. Cells that are cheap and matter most come first.

    python benchmarks/accuracy.py [--folder F] [--seeds 1 2 3 4 5] [--show] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from trainings import budget, fill, kept_cells, mean_reached, sites_in, told

from silotune.data.demo import write_hospitals
from silotune.data.demo_bank import write_banks
from silotune.plan.plan import Plan
from silotune.simulation.baselines import IN_THE_CLEAR, Kind

TASKS = ("code", "category", "bank")
METHODS = ("own", "probe", "cosines", "lora", "both", "pooled", "pooled_lora")
ADAPTERS = ("lora", "both", "pooled_lora")
ALONE = ("own", "pooled", "pooled_lora")  # one trainer: who adds the noise makes no difference
NOISES = ("shared", "local", "shared_bands", "local_bands")
COSINES = {"kind": "cosines", "number": 2048, "scale": 1.5}
LORA = {"lora.r": 2, "lora.target_modules": ["query", "value"], "lora.last_layers": 1}
BANDS = {"privacy.bands": 8, "optimizer.server.name": "sgd"}
NOISE = {
    "shared": {},
    "local": IN_THE_CLEAR,
    "shared_bands": BANDS,
    "local_bands": {**IN_THE_CLEAR, **BANDS},
}


@dataclass(frozen=True)
class Cell:
    """One training, or of ``own`` one a site."""

    task: str
    method: str
    epsilon: float | None
    noise: str
    seed: int

    @property
    def row(self) -> tuple[str, float | None, str]:
        return self.task, self.epsilon, self.noise

    @property
    def key(self) -> str:
        return "|".join(str(value) for value in asdict(self).values())

    @staticmethod
    def read(key: str) -> Cell:
        task, method, epsilon, noise, seed = key.split("|")
        return Cell(task, method, None if epsilon == "None" else float(epsilon), noise, int(seed))

    def plan(self, demo: Path) -> Plan:
        rounds = Plan.written_in(demo).rounds.number
        settings = {"plan.seed": self.seed, "rounds.min_sites": 1, **NOISE[self.noise]}
        settings |= budget(self.epsilon)
        settings |= IN_THE_CLEAR if self.method in ALONE else {}
        adapts = self.method in ADAPTERS
        settings |= LORA if adapts else {"optimizer.site.head_rounds": rounds}
        plan = Plan.load(demo, settings)  # what is left out follows from these
        seen = {
            "probe": None,
            "cosines": COSINES,
            "lora": None,
            "both": COSINES,
            "pooled_lora": None,
        }
        found = {"model.head_features": seen[self.method]} if self.method in seen else {}
        return plan.override(found)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """What is to be trained, in the order of what it costs and tells."""
    some = [
        (("probe", "cosines"), (8.0,), ("shared",)),
        (("own", "pooled"), (8.0, None), ("shared",)),
        (("probe", "cosines"), (8.0,), ("local", "local_bands", "shared_bands")),
        (("lora",), (8.0,), ("shared",)),
        (("probe", "cosines"), (None, 3.0, 1.0), ("shared",)),
        (("both",), (8.0,), ("shared",)),
        (("probe", "cosines"), (3.0, 1.0), ("local", "local_bands", "shared_bands")),
        (("own", "pooled"), (3.0, 1.0), ("shared",)),
        (("lora", "both"), (3.0, 1.0), ("shared",)),
        (("pooled_lora",), (8.0, 3.0, 1.0), ("shared",)),
        (("lora", "pooled_lora", "both"), (None,), ("shared",)),
        (("lora", "both"), (8.0, 3.0, 1.0), ("local",)),
    ]
    for methods, epsilons, noises in some:
        for task, epsilon, noise in product(options.tasks, epsilons, noises):
            if noise in options.noises:
                for method, seed in product(methods, options.seeds):
                    if method in options.methods:
                        yield Cell(task, method, epsilon, noise, seed)


def trained(cell: Cell, folder: Path) -> float:
    """Macro-F1 on the test records of all sites."""
    kinds: dict[str, Kind] = {"own": "own", "pooled": "pooled", "pooled_lora": "pooled"}
    return mean_reached(
        cell.key,
        cell.plan(folder / cell.task / "plan.toml"),
        sites=sites_in(folder / cell.task),
        shared=folder / "shared",
        kind=kinds.get(cell.method, "federated"),
    )


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Write the demos that are not there yet."""
    for task in options.tasks:
        if (folder / task).exists():
            continue
        if task == "bank":
            write_banks(folder / task, quick=options.quick)
        else:
            write_hospitals(folder / task, split=task, rows_per_site=400 if options.quick else None)


def table(found: dict[str, float]) -> Iterator[str]:
    """The cells as Markdown: mean (standard deviation), and how many seeds where not five."""
    scores: dict[tuple, dict[str, list[float]]] = {}
    for key, score in found.items():
        cell = Cell.read(key)
        scores.setdefault(cell.row, {}).setdefault(cell.method, []).append(score)
    methods = [m for m in METHODS if any(m in row for row in scores.values())]
    yield "| task | ε | noise | " + " | ".join(m.replace("_", " ") for m in methods) + " |"
    yield "|---|---|---|" + "---|" * len(methods)
    for row in sorted(scores, key=_place):
        task, epsilon, noise = row
        if epsilon is None:
            who = ["none", "none"]
        else:
            who = [f"{epsilon:g}", noise.replace("_bands", ", correlated")]
        scored = [told(scores[row].get(method, [])) for method in methods]
        yield f"| {' | '.join([task, *who, *scored])} |"


def _place(row: tuple[str, float | None, str]) -> tuple[int, float, int]:
    return TASKS.index(row[0]), -(row[1] or math.inf), NOISES.index(row[2])


def run(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """All cells, those of an earlier call included."""
    if options.show:
        return kept_cells(folder)
    prepare(folder, options)
    return fill(cells(options), folder, lambda cell: trained(cell, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep sites, features and cells here")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--noises", nargs="+", default=NOISES, choices=NOISES)
    parser.add_argument(
        "--show", action="store_true", help="print what is there, and train nothing"
    )
    parser.add_argument("--quick", action="store_true", help="few records, one seed, two methods")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    options = parser.parse_args()
    if options.quick:
        options.tasks, options.methods, options.seeds = ["code"], ["probe", "cosines"], [1]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = run(folder, options)
    print(
        f"\n{time.strftime('%Y-%m-%d')}, test macro-F1, mean (standard deviation) [seeds if not five]"
    )
    print("\n".join(table(found)))
    if options.json:
        print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
