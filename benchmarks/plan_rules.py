"""What the demo's plan of required keys reaches, beside one that was tuned by hand: macro-F1.

Both splits, three seeds, shared noise. A plan of required keys takes its numbers from the
rules of `silotune.plan.left_out`; the other (benchmarks/tuned.py) was tuned on validation records. Rows:

- required: the demo's plan
- required_linear: the same without random cosines
- tuned: the plan that was tuned by hand, LoRA in its last rounds (slow: give --rows to leave it out)
- tuned_head: the same plan, head alone
- tuned_cosines: the same, LoRA in its last rounds, with random cosines under its head
- long: the plan that was tuned by hand, head alone, 340 rounds

    python benchmarks/plan_rules.py [--rows ...] [--seeds 1 2 3] [--splits ...] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from trainings import reached, show, sites_in, training
from tuned import tuned

from silotune.data.demo import write_hospitals
from silotune.plan.plan import Plan
from silotune.simulation.baselines import head_only

ROWS = ("required", "required_linear", "tuned_head", "tuned", "tuned_cosines", "long")


def plans(demo: Path, *, rounds: int | None, epsilon: float) -> dict[str, Plan]:
    settings = {"privacy.epsilon": epsilon} | ({"rounds.number": rounds} if rounds else {})
    least, by_hand = Plan.load(demo, settings), tuned(Plan.load(demo, {"privacy.epsilon": epsilon}))
    cosines = {"kind": "cosines", "number": 2048, "scale": 1.5}
    return {
        "required": least,
        "required_linear": least.override({"model.head_features": None}),
        "tuned_head": head_only(by_hand),
        "tuned": by_hand,
        "tuned_cosines": by_hand.override({"model.head_features": cosines}),
        "long": head_only(by_hand.override({"rounds.number": 340})),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--splits", nargs="+", default=["code", "category"])
    parser.add_argument("--rounds", type=int, help="of the plans of required keys; else the demo's")
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
            made = plans(folder / "plan.toml", rounds=options.rounds, epsilon=options.epsilon)
            sites = sites_in(folder)
            for seed in options.seeds:
                jobs = [
                    training(
                        row,
                        plan.override({"plan.seed": seed}),
                        sites=sites,
                        shared=Path(scratch) / "shared",
                    )
                    for row, plan in made.items()
                    if row in options.rows
                ]
                for done, score in reached(jobs):
                    found[f"{split} {done.job.key}"].append(score)
                    print(
                        f"{split}, seed {seed}, {done.job.key}: {score:.4f} ({done.seconds:.0f} s)",
                        flush=True,
                    )
    print(f"\n{time.strftime('%Y-%m-%d')}, test macro-F1: mean (standard deviation)")
    show(found, width=28)
    if options.json:
        print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
