"""Noise that is correlated over rounds, on paper and on the demo: what privacy.bands is worth.

- noise: the noise in a run's adapters at equal epsilon, beside that of independent noise; no training.
  Root mean square over all adapters, and of the last one: noise multiplier times what the weights leave.
- demo: the hospitals' head, alone or on random cosines, each site adding noise of its own, or its share
  (--noise shared), through the package's own trainers and server: test macro-F1, mean and standard
  deviation over seeds. Beside it independent noise under Adam, the default.

    python benchmarks/bands.py noise|demo [--bands 1 8] [--epsilon 8 3 1] [--seeds 1 2 3] [--quick]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from trainings import reached, show, sites_in, training

from silotune.client.terms import sigma_for
from silotune.data.demo import write_hospitals
from silotune.plan.bands import band_weights, noise_in_adapters
from silotune.plan.plan import Plan
from silotune.simulation.baselines import IN_THE_CLEAR

SHAPES = ((72, 0.06), (340, 0.06), (120, 0.12), (40, 0.1), (500, 0.02))
MOMENTUM = 0.9


def paper_plan(rounds: int, rate: float, epsilon: float, bands: int) -> Plan:
    return Plan.from_mapping(
        {
            "plan": {"name": "bands", "purpose": "a benchmark"},
            "model": {"base": "x", "task": "text_classification", "labels": ["a", "b"]},
            "lora": {"target_modules": "none"},
            "data": {"dataset": "texts"},
            "rounds": {"number": rounds},
            "optimizer": {"server": {"name": "sgd", "momentum": MOMENTUM}},
            "privacy": {
                "mode": "record",
                "epsilon": epsilon,
                "delta": 1e-5,
                "clip": 2.0,
                "rate": rate,
                "bands": bands,
            },
        }
    )


def noise(
    bands: list[int], epsilons: list[float], shapes: tuple[tuple[int, float], ...]
) -> dict[str, list[float]]:
    found = {}
    print("rounds  rate  epsilon  bands  sigma   of independent noise: all adapters, the last")
    for rounds, rate in shapes:
        for epsilon in epsilons:
            plain = sigma_for(paper_plan(rounds, rate, epsilon, 1), 1000)
            for several in bands:
                if several * rate > 1 or several == 1:
                    continue
                plan = paper_plan(rounds, rate, epsilon, several)
                sigma, weights = sigma_for(plan, 1000), band_weights(plan)[0]
                left = [
                    sigma / plain * noise_in_adapters(plan, weights, last=last)
                    for last in (False, True)
                ]
                print(
                    f"{rounds:6} {rate:5} {epsilon:8g} {several:6} {sigma:6.3f}"
                    f"   {left[0]:.3f} {left[1]:.3f}",
                    flush=True,
                )
                found[f"rounds {rounds}, rate {rate}, epsilon {epsilon:g}, bands {several}"] = left
    return found


def demo_plans(path: Path, options: argparse.Namespace, epsilon: float) -> dict[str, Plan]:
    common: dict[str, Any] = {
        **(IN_THE_CLEAR if options.noise == "local" else {"privacy.noise": "shared"}),
        "privacy.epsilon": epsilon,
        "lora": {"target_modules": "none", "r": 1},
        "rounds.number": options.rounds,
        "privacy.rate": options.rate,
        "privacy.metrics_share": None,
        "rounds.evaluate_every": 0,
    }
    kinds = {"linear": None, "cosines": {"kind": "cosines", "number": 2048, "scale": 1.5}}
    sgd = {"optimizer.server": {"name": "sgd", "momentum": MOMENTUM}}
    made = {}
    for kind in options.heads:
        for rate in options.lr or [None]:
            by, own = ("the rule", {}) if rate is None else (f"{rate:g}", {"head_lr": rate})
            settings = {**common, **{f"optimizer.site.{key}": value for key, value in own.items()}}
            for several in options.bands:
                plan = Plan.load(path, {**settings, **sgd, "privacy.bands": several})
                made[f"{kind}, bands {several}, rate {by}"] = plan
        made[f"{kind}, Adam, rate the rule"] = Plan.load(path, common)
    return {
        row: plan.override({"model.head_features": kinds[row.partition(",")[0]]})
        for row, plan in made.items()
    }


def demo(options: argparse.Namespace) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "code"
        write_hospitals(folder, split="code", rows_per_site=400 if options.quick else None)
        sites = sites_in(folder)
        for epsilon in options.epsilon:
            made = demo_plans(folder / "plan.toml", options, epsilon)
            for seed in options.seeds:
                jobs = [
                    training(
                        row,
                        plan.override({"plan.seed": seed}),
                        sites=sites,
                        shared=Path(scratch) / "shared",
                    )
                    for row, plan in made.items()
                ]
                for done, score in reached(jobs):
                    found[f"epsilon {epsilon:g}, {done.job.key}"].append(score)
                    print(
                        f"epsilon {epsilon:g}, seed {seed}, {done.job.key}: {score:.4f} "
                        f"({done.seconds:.0f} s)",
                        flush=True,
                    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", default="noise", choices=("noise", "demo"))
    parser.add_argument("--noise", default="local", choices=("local", "shared"), help="of the demo")
    parser.add_argument("--bands", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--epsilon", nargs="+", type=float, default=[8.0, 3.0, 1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=72)
    parser.add_argument("--rate", type=float, default=0.06)
    parser.add_argument(
        "--lr", nargs="+", type=float, help="of the head, under SGD; else the rule's"
    )
    parser.add_argument("--heads", nargs="+", default=["linear", "cosines"])
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    parser.add_argument("--quick", action="store_true", help="400 records a site, one seed")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epsilon, options.heads = [1], [8.0], ["linear"]
        options.rounds = min(options.rounds, 16)
    if options.what == "noise":
        found = noise(options.bands, options.epsilon, SHAPES[:1] if options.quick else SHAPES)
    else:
        found = demo(options)
        print(f"\n{time.strftime('%Y-%m-%d')}, test macro-F1: mean (standard deviation)")
        show(found, width=32)
    if options.json:
        print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
