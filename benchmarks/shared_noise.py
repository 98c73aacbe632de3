"""Shared noise on the hospitals demo: macro-F1 against pooled DP training and against local noise.

All at epsilon 8, on the test records of all seven hospitals. "Shared" is the real thing: a simulation
with secure aggregation in which each site adds its share of the noise. "Pooled" is one trainer with
everybody's records and central noise, "local" the federation in which each site adds all of its own.

    python benchmarks/shared_noise.py [--quick] [--json] [--seeds 3] [--split code] [--threshold 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from trainings import reached, sites_in, spread, training
from tuned import TUNED

from silotune.data.demo import write_hospitals
from silotune.plan.plan import Plan
from silotune.simulation.baselines import Kind, head_only, in_the_clear
from silotune.simulation.run import Settings, simulate


def shared(threshold: int) -> dict:
    return {
        "aggregation.secure": True,
        "aggregation.cohort": 7,
        "aggregation.threshold": threshold,
        "privacy.noise": "shared",
    }


def simulated(plan_path: Path, plan: Plan, folder: Path, *, threshold: int, workers: int) -> float:
    """Macro-F1 of a whole simulation under shared noise."""
    overrides = {
        **TUNED,
        **shared(threshold),
        "plan.seed": plan.plan.seed,
        "rounds.evaluate_every": 0,
        "rounds.number": plan.rounds.number,
        "optimizer.site.head_rounds": plan.optimizer.site.head_rounds,
    }
    directory = simulate(
        plan_path,
        runs=folder,
        settings=Settings(workers=workers),
        listener=lambda event: None,
        overrides=overrides,
    )
    methods = directory.read_json("results.json")["methods"]
    (method,) = (row for row in methods if row["key"] == "federated")
    return float(method["test"]["macro_f1"])


def compared(
    plan: Plan, sites: tuple[str, ...], kinds: dict[str, Kind], shared_folder: Path, *, workers: int
) -> dict:
    """Macro-F1 of the comparison models."""
    plan = in_the_clear(plan)
    jobs = [
        training(
            row,
            head_only(plan) if row.startswith("head") else plan,
            sites=sites,
            shared=shared_folder,
            kind=kind,
        )
        for row, kind in kinds.items()
    ]
    return {done.job.key: score for done, score in reached(jobs, workers=workers)}


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = 400 if options.quick else options.rows
        demo = write_hospitals(folder / "demo", split=options.split, rows_per_site=rows)
        sites = sites_in(folder / "demo")
        (folder / "scratch").mkdir()
        # What is cheap first, seeds inside: a run that is cut short leaves balanced rows.
        for prefix in options.models:
            for seed in range(1, options.seeds + 1):
                started = time.time()
                plan = Plan.load(demo.plan).override({**TUNED, "plan.seed": seed})
                if options.quick:
                    plan = plan.override({"rounds.number": 6, "optimizer.site.head_rounds": 5})
                kinds = {f"{prefix} pooled": "pooled", f"{prefix} local": "federated"}
                values = compared(plan, sites, kinds, folder / "scratch", workers=options.workers)
                values[f"{prefix} shared"] = simulated(
                    demo.plan,
                    head_only(plan) if prefix == "head" else plan,
                    folder / f"{prefix}-{seed}",
                    threshold=options.threshold,
                    workers=options.workers,
                )
                for row, value in values.items():
                    found[row].append(value)
                shown = {row: round(value, 4) for row, value in values.items()}
                print(f"seed {seed}: {time.time() - started:.0f} s {shown}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="400 records a site, 6 rounds, 1 seed")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", default="code", choices=["code", "category"])
    parser.add_argument("--rows", type=int, default=None, help="records a site; all by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["head", "lora"], choices=["head", "lora"])
    parser.add_argument("--threshold", type=int, default=5, help="honest survivors, of seven sites")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.models, options.workers = 1, ["head"], 1
    torch.set_num_threads(1)
    found, numbers = measure(options), {}
    print(f"\ntest macro-F1, epsilon 8, split by {options.split}, {options.seeds} seeds: mean (sd)")
    for row, values in found.items():
        print(f"  {row:14s} {statistics.fmean(values):.4f} ({spread(values):.4f})")
        numbers[row.replace(" ", "_")] = round(statistics.fmean(values), 4)
        numbers[row.replace(" ", "_") + ".sd"] = round(spread(values), 4)
    for model in options.models:
        ours = statistics.fmean(found[f"{model} shared"])
        for peer in ("pooled", "local"):
            gap = ours - statistics.fmean(found[f"{model} {peer}"])
            print(f"  {model} shared minus {model} {peer}: {gap:+.4f}")
            numbers[f"{model}.shared_minus_{peer}"] = round(gap, 4)
    if options.json:
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()
