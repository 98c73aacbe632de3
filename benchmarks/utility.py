"""Utility on the hospitals demo: federated, own-only, pooled and head-only, with and without privacy.

Three seeds and both splits by default: over an hour on two cores. Every model of a row is scored on
the test records of all seven hospitals; the settings were chosen on validation records (one seed):
those of benchmarks/tuned.py, with LoRA in the last rounds.

    python benchmarks/utility.py [--quick] [--json] [--seeds 1 2 3] [--splits code category]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tuned import tuned

from silotune.data.demo import write_hospitals
from silotune.data.site import load_sites
from silotune.models.choices import choose
from silotune.plan.plan import Plan
from silotune.simulation.baselines import Job, head_only, in_the_clear, run_jobs
from silotune.simulation.outcome import metrics_of

WITHOUT_PRIVACY = {
    "privacy.mode": "none",
    "privacy.epsilon": None,
    "privacy.delta": None,
    "privacy.clip": None,
}
ROWS = {
    "own_none": "own records only, no privacy",
    "own_probe_none": "own records only, head only, no privacy",
    "own_8": "own records only, eps 8",
    "probe_federated_none": "federated head only, no privacy",
    "federated_none": "federated LoRA, no privacy",
    "pooled_none": "pooled LoRA, no privacy",
    "probe_federated_8": "federated head only, eps 8",
    "federated_8": "federated LoRA, eps 8",
    "federated_bf16": "federated LoRA, eps 8, bfloat16 products",
    "pooled_8": "pooled LoRA, eps 8",
    "probe_federated_3": "federated head only, eps 3",
    "federated_3": "federated LoRA, eps 3",
}
KINDS = {
    "own": "own",
    "own_probe": "own",
    "probe_federated": "federated",
    "federated": "federated",
    "pooled": "pooled",
}


def jobs(plan: Plan, sites: list, *, seed: int, rows: list[str], shared: Path) -> list[Job]:
    paths = tuple(str(site.folder / "site.toml") for site in sites)
    plans = {
        "none": in_the_clear(plan).override(
            {**WITHOUT_PRIVACY, "plan.seed": seed, "rounds.min_sites": 1}
        ),
        "8": plan.override({"plan.seed": seed, "rounds.min_sites": 1}),
        "3": plan.override({"plan.seed": seed, "rounds.min_sites": 1, "privacy.epsilon": 3.0}),
    }
    plans["bf16"] = plans["8"].override({"model.dtype": "bfloat16"})
    choices = {budget: asdict(choose(of)) for budget, of in plans.items()}
    found = []
    for row in rows:
        method, _, budget = row.rpartition("_")
        of = head_only(plans[budget]) if "probe" in method else plans[budget]
        if KINDS[method] != "federated":
            of = in_the_clear(of)
        job = Job(
            key=row,
            title=row,
            plan=of.canonical(),
            kind=KINDS[method],
            sites=paths,
            choices=choices[budget],
            shared=str(shared),
        )
        names = [site.name for site in sites] if method.startswith("own") else [None]
        found += [replace(job, site=name) for name in names]
    return found


def scores(plan: Plan, outcomes: list) -> dict[str, float]:
    """Macro-F1 on everybody's test records; for own-only the mean over the sites' models."""
    found = defaultdict(list)
    for outcome in outcomes:
        found[outcome.job.key].append(metrics_of(plan, sum(outcome.counts.values()))["macro_f1"])
    return {row: float(np.mean(values)) for row, values in found.items()}


def prepared(split: str, folder: Path, *, quick: bool) -> tuple[Plan, list]:
    demo = write_hospitals(folder / split, split=split, rows_per_site=400 if quick else None)
    plan = tuned(Plan.load(demo.plan))
    if quick:
        plan = plan.override({"rounds.number": 6, "optimizer.site.head_rounds": 3})
    return plan, list(load_sites(folder / split))


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Scores by split and row, one a seed; seeds in the outer loop, so that a cut run is balanced."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as folder:
        ready = {s: prepared(s, Path(folder), quick=options.quick) for s in options.splits}
        for seed in options.seeds:
            for split, (plan, sites) in ready.items():
                started = time.time()
                todo = jobs(
                    plan, sites, seed=seed, rows=options.rows, shared=Path(folder) / "shared"
                )
                values = scores(plan, list(run_jobs(todo, workers=2)))
                for row, value in values.items():
                    found[split][row].append(value)
                shown = {row: round(value, 4) for row, value in values.items()}
                print(f"{split}, seed {seed}: {time.time() - started:.0f} s {shown}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="400 records a site, 6 rounds, 1 seed")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--splits", nargs="+", default=["code", "category"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.splits = [1], ["code"]
        options.rows = ["probe_federated_8", "federated_8"]
    torch.set_num_threads(1)
    numbers = {}
    for split, rows in measure(options).items():
        print(
            f"\ntest macro-F1, split by {split}, {len(options.seeds)} seeds: mean (standard deviation)"
        )
        for row, values in rows.items():
            mean = statistics.fmean(values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"  {ROWS[row]:36s} {mean:.3f} ({spread:.3f})")
            numbers[f"{split}.{row}"] = round(mean, 4)
            numbers[f"{split}.{row}.sd"] = round(spread, 4)
    if options.json:
        print(json.dumps(numbers))


if __name__ == "__main__":
    sys.exit(main())
