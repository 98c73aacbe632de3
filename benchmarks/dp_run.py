"""What privacy costs a whole site: a plan's rounds with it and without, on the same batches.

The plan is the hospitals', with an adapter in its last rounds (benchmarks/tuned.py). Both runs have one
seed, so that every site draws the same records in the same round. They take turns round by round:
sampling, training, clipping, noise and the self-checks, all that a site computes.

    python benchmarks/dp_run.py            # seven hospitals, 12 head and 8 adapter rounds
    python benchmarks/dp_run.py --quick    # two small hospitals: under 50 s
    python benchmarks/dp_run.py --json     # the last line is one JSON object
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tuned import tuned

from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.data.demo import write_hospitals
from silotune.data.site import load_sites
from silotune.models.choices import choose
from silotune.models.layout import initial_adapter
from silotune.plan.plan import Plan
from silotune.simulation.baselines import in_the_clear

OPEN = {
    "privacy.mode": "none",
    "privacy.epsilon": None,
    "privacy.delta": None,
    "privacy.clip": None,
}
TARGET = 1.05
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def sites_of(plan: Plan, folder: Path, state: Path, *, most: int) -> list[SiteRun]:
    """The hospitals' parts in a run, ready to train."""
    models = ModelCache(choose(plan), shared=folder / "shared")
    runs = [
        SiteRun(site, state=state / site.name, plan=plan, run="benchmark", models=models)
        for site in load_sites(folder)[:most]
    ]
    for run in runs:
        run.training.prepare()
        run.trainer = run.training.alone()  # with all of a round's work in it
    return runs


def turn(runs: list[SiteRun], number: int) -> dict[str, float]:
    """Seconds of one round at all sites, one after the other, by both clocks."""
    adapter = initial_adapter(runs[0].layout, runs[0].plan)
    # Away from the start, where B and head are zero and A has no gradient.
    adapter += np.random.default_rng(number).normal(0.0, 0.01, adapter.size).astype(np.float32)
    start = {name: clock() for name, clock in CLOCKS.items()}
    for run in runs:
        run.trainer.round(adapter, number)
    return {name: clock() - start[name] for name, clock in CLOCKS.items()}


def measure(plans: dict[str, Plan], folder: Path, *, sites: int) -> dict[str, list[float]]:
    """Seconds of every round of both plans in turns, by ``<phase>.<plan>.<clock>``."""
    state = folder / "state"
    runs = {name: sites_of(plan, folder, state / name, most=sites) for name, plan in plans.items()}
    head = plans["private"].optimizer.site.head_rounds
    seconds: dict[str, list[float]] = {}
    for number in range(1, plans["private"].rounds.number + 1):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            phase = "head" if number <= head else "adapter"
            for clock, value in turn(runs[name], number).items():
                seconds.setdefault(f"{phase}.{name}.{clock}", []).append(value)
    records = {name: sum(run.trainer.records_used for run in found) for name, found in runs.items()}
    assert records["private"] == records["open"], records  # the same batches, or nothing compares
    return seconds


def ratios(seconds: dict[str, list[float]], demo: Plan) -> dict[str, float]:
    """Print and return private over open: by phase, and for all rounds of the plan."""
    head = demo.optimizer.site.head_rounds
    rounds = {"head": head, "adapter": demo.rounds.number - head}
    numbers: dict[str, float] = {}
    for clock in CLOCKS:
        total = {"private": 0.0, "open": 0.0}
        for phase, count in rounds.items():
            ours, twin = (seconds[f"{phase}.{name}.{clock}"] for name in total)
            pairs = [a / b for a, b in zip(ours, twin, strict=True)]
            low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
            medians = statistics.median(ours), statistics.median(twin)
            for name, median in zip(total, medians, strict=True):
                total[name] += count * median
            label = f"{phase}_rounds.private_over_open_{clock}"
            numbers[label] = round(middle, 4)
            shown = " and ".join(f"{1e3 * median:.1f}" for median in medians)
            print(f"{label:44s} {middle:.3f} [{low:.3f} to {high:.3f}] {shown} ms")
        numbers[f"demo.private_over_open_{clock}"] = round(total["private"] / total["open"], 4)
    whole = numbers["demo.private_over_open_wall"]
    verdict = "holds" if whole <= TARGET else "MISSED"
    print(
        f"all {demo.rounds.number} rounds of the plan, wall time: {whole:.3f}, "
        f"target {TARGET}: {verdict}"
    )
    return numbers


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two hospitals of 1,500 records")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {version('torch')}, opacus {version('opacus')}, one thread")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        written = write_hospitals(folder, rows_per_site=1500 if options.quick else None)
        demo = tuned(in_the_clear(Plan.load(written.plan)))
        demo = demo.override({"plan.seed": 1, "rounds.min_sites": 1})
        head, adapter = (6, 6) if options.quick else (12, 8)
        short = demo.override({"rounds.number": head + adapter, "optimizer.site.head_rounds": head})
        plans = {"private": short, "open": short.override(OPEN)}
        seconds = measure(plans, folder, sites=2 if options.quick else 7)
    numbers = ratios(seconds, demo)
    if options.json:
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()
