"""Steps of a private head that the package does not take: macro-F1 on validation records, by code.

The hospitals demo's records in one place, its features and its plan's split, a linear head, shared
noise; the loop is that of heads.py. Beside clipping and Adam:

- AUTO-S: each unit's gradient divided by its norm + gamma in the place of clipping (arXiv 2206.07136)
- corrected: the known variance of the noise taken off Adam's second moment, down to a floor in
  standard deviations of that noise (arXiv 2312.14334)

A gain is that over clipping and Adam at the rate by rule, seed by seed, with its standard error. The
folder of accuracy.py has its features.

    python benchmarks/head_steps.py [--folder F] [--seeds 1 2 3] [--epsilon 8 1] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accuracy import Cell, jobs, prepare
from heads import RATE, ROUNDS, macro_f1, sigma, trained
from trainings import spread

from silotune.data.records import Split
from silotune.plan.plan import Plan
from silotune.simulation import baselines

RULE = 0.083
STEPS = {
    "clipped, Adam": [{"lr": lr} for lr in (RULE, 0.05, 0.15)],
    "AUTO-S": [
        {"lr": lr, "gamma": g}
        for g, lr in (
            (0.01, 0.05),
            (0.01, RULE),
            (0.01, 0.15),
            (0.01, 0.3),
            (1.0, RULE),
            (1.0, 0.15),
        )
    ],
    "corrected": [
        {"lr": lr, "floor": f} for f, lr in ((1.0, RULE), (0.3, RULE), (0.3, 0.03), (0.1, 0.01))
    ],
}


def records(folder: Path, seed: int) -> dict[Split, tuple[torch.Tensor, torch.Tensor]]:
    """What the head sees and the labels of all sites' records, by split."""
    (job,) = jobs(Cell("code", "probe", 8.0, "shared", seed), folder)
    plan = Plan.from_canonical(job.plan)
    models = baselines._models(json.dumps(dict(job.choices), sort_keys=True), job.shared)
    found: dict[Split, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for part in baselines._parts(job, plan, models=models, scratch=Path(scratch)):
            local = baselines._local(part)
            features = local.trainer.frozen.features
            targets = torch.from_numpy(local.encoded.targets)
            for split in (Split.TRAIN, Split.VALIDATION):
                rows = local.records.rows(split)
                seen = torch.cat([features[rows], torch.ones(len(rows), 1)], 1)
                found.setdefault(split, []).append((seen, targets[rows]))
    return {
        split: (torch.cat([s for s, _ in parts]), torch.cat([n for _, n in parts]))
        for split, parts in found.items()
    }


def rows(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, list[float]]]:
    by_seed = {seed: records(folder, seed) for seed in options.seeds}
    for epsilon in options.epsilon:
        noise = sigma(epsilon, RATE, ROUNDS)
        for name, settings in STEPS.items():
            for step in settings:
                told = ", ".join(f"{key.replace('lr', 'rate')} {v:g}" for key, v in step.items())
                scores = []
                for seed, split in by_seed.items():
                    seen, labels = split[Split.TRAIN]
                    head = trained(seen, labels, 2, noise=noise, seed=seed, **step)
                    held, true = split[Split.VALIDATION]
                    predicted = (held @ head).argmax(1).numpy()
                    scores.append(macro_f1(predicted, true.numpy(), 2))
                yield f"eps {epsilon:g}, {name}, {told}", scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="of accuracy.py: its sites and features")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epsilon", nargs="+", type=float, default=[8.0, 1.0])
    parser.add_argument("--quick", action="store_true", help="400 records a site, two seeds")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    options = parser.parse_args()
    options.tasks = ["code"]
    if options.quick:
        options.seeds, options.epsilon = [1, 2], [8.0]
    torch.set_num_threads(1)
    numbers: dict[str, list[float]] = {}
    print(f"{time.strftime('%Y-%m-%d')}, validation macro-F1: mean (standard deviation), gain")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        prepare(folder, options)
        for row, scores in rows(folder, options):
            numbers[row] = [round(score, 4) for score in scores]
            epsilon = row.split(",")[0]
            base = next(found for other, found in numbers.items() if other.startswith(epsilon))
            gains = [new - old for new, old in zip(numbers[row], base, strict=True)]
            error = spread(gains) / len(gains) ** 0.5
            print(
                f"  {row:50} {statistics.fmean(scores):.3f} ({spread(scores):.3f}), "
                f"{statistics.fmean(gains):+.4f} ({error:.4f})",
                flush=True,
            )
    if options.json:
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()
