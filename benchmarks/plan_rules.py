"""What plans of required keys only reach on the demo, beside the demo's tuned plan: macro-F1.

Both splits, three seeds, shared noise. A plan of required keys takes its numbers from the
rules of `silotune.plan.left_out`; the demo's plan was tuned on validation records, one seed. Rows:

- tuned: the demo's plan, LoRA in its last rounds (slow: give --rows to leave it out)
- tuned_head: the same plan, head alone
- required: required keys only
- required_linear: the same without random cosines
- tuned_cosines: the demo's plan with random cosines under its head
- long: the demo's plan, head alone, 340 rounds

    python benchmarks/plan_rules.py [--rows ...] [--seeds 1 2 3] [--splits ...] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import tomllib
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch

from silotune.data.demo import write_hospitals
from silotune.data.site import load_sites
from silotune.models.choices import choose
from silotune.plan.plan import Plan
from silotune.simulation.baselines import Job, head_only, run_jobs
from silotune.simulation.outcome import metrics_of

ROWS = ("required", "required_linear", "tuned_head", "tuned", "tuned_cosines", "long")


def required(demo: Path, *, rounds: int) -> str:
    """The demo's plan without anything that may be left out, but for the split and who adds noise."""
    tuned = tomllib.loads(demo.read_text("utf-8"))
    model = {key: tuned["model"][key] for key in ("base", "task", "labels")}
    data = {key: tuned["data"][key] for key in ("dataset", "split_by")}
    privacy = {"mode": "record", "epsilon": 8.0, "delta": 1e-5, "rate": 0.12, "noise": "shared"}
    tables = {
        "plan": {"name": "required", "purpose": tuned["plan"]["purpose"]},
        "model": model,
        "data": data,
        "rounds": {"number": rounds},
        "privacy": privacy,
        "privacy.clip": {"head": 2.0, "adapter": 2.0},
        "aggregation": {"secure": True, "cohort": 7, "threshold": 5},
    }
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines)


def plans(folder: Path, *, rounds: int, epsilon: float) -> dict[str, Plan]:
    path, level = folder / "required.toml", {"privacy.epsilon": epsilon}
    path.write_text(required(folder / "plan.toml", rounds=rounds), "utf-8")
    tuned, least = Plan.load(folder / "plan.toml", level), Plan.load(path, level)
    cosines = {"kind": "cosines", "number": 2048, "scale": 1.5}
    long = {"rounds.number": 340, "optimizer.site.head_rounds": 340}
    linear = least.override({"model.head_features": None})
    return {
        "required": least,
        "required_linear": linear,
        "tuned_head": head_only(tuned),
        "tuned": tuned,
        "tuned_cosines": tuned.override({"model.head_features": cosines}),
        "long": head_only(tuned.override(long)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--splits", nargs="+", default=["code", "category"])
    parser.add_argument("--rounds", type=int, default=120, help="of the plans of required keys")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    parser.add_argument(
        "--quick", action="store_true", help="400 records a site, one seed and split"
    )
    options = parser.parse_args()
    if options.quick:
        options.rows, options.seeds, options.splits = ["required"], [1], ["code"]
    torch.set_num_threads(1)
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        for split in options.splits:
            folder = Path(scratch) / split
            write_hospitals(folder, split=split, rows_per_site=400 if options.quick else None)
            made = plans(folder, rounds=options.rounds, epsilon=options.epsilon)
            paths = tuple(str(site.folder / "site.toml") for site in load_sites(folder))
            for seed in options.seeds:
                jobs = [
                    Job(
                        key=row,
                        title=row,
                        plan=(of := plan.override({"plan.seed": seed})).canonical(),
                        kind="federated",
                        sites=paths,
                        choices=asdict(choose(of)),
                        shared=str(Path(scratch) / "shared"),
                    )
                    for row, plan in made.items()
                    if row in options.rows
                ]
                for done in run_jobs(jobs, workers=1):
                    plan = Plan.from_canonical(done.job.plan)
                    score = metrics_of(plan, sum(done.counts.values()))["macro_f1"]
                    found[f"{split} {done.job.key}"].append(score)
                    print(
                        f"{split}, seed {seed}, {done.job.key}: {score:.4f} ({done.seconds:.0f} s)",
                        flush=True,
                    )
    print(f"\n{time.strftime('%Y-%m-%d')}, test macro-F1: mean (standard deviation)")
    for row, scores in sorted(found.items()):
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        print(f"  {row:28} {statistics.fmean(scores):.3f} ({spread:.3f})")
    if options.json:
        print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
