"""Does a vote find the settings that do best for all sites? On the hospitals demo, head alone.

    python benchmarks/votes.py [--folder F] [--grids ...] [--seeds 3] [--quick] [--json]

The demo is made anew unless --folder has it (`silotune demo hospitals F`). For each grid of
candidates it prints macro-F1 on test records that the whole federation reaches with each (epsilon 8,
mean over seeds), the votes of all blocks at two sizes, and from these how often a vote at epsilon .25,
.5, 1 and 2 chooses a candidate within .01 of the best, and what it loses on average, over 20,000 draws
of the noise. Heads are trained by the formulas of `silotune.client.votes` and of the plan's server
(Adam), written out in NumPy over features that silotune computed: some hundred times as fast as the
trainer, on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from silotune.client.model_cache import ModelCache
from silotune.data.demo import write_hospitals
from silotune.data.records import SCORED, Split, load_records
from silotune.data.site import load_sites
from silotune.models.features import compute_frozen
from silotune.plan.plan import Plan
from silotune.privacy.accounting import calibrate

RATE, EPSILON, DELTA, SITES, SHARERS = 0.12, 8.0, 1e-5, 7, 5
EPSILONS = (0.25, 0.5, 1.0, 2.0)  # of the vote
HEAD_ALONE = {"lora": {"target_modules": "none", "r": 1}, "optimizer.site.head_rounds": 0}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """Rounds, learning rate and clip of a head."""

    rounds: int = 130
    rate: float = 0.1
    clip: float = 2.0


GRIDS = {
    "rates, far apart": [Candidate(rate=r) for r in (1e-4, 1e-3, 0.1, 3.0, 30.0)],
    "rates, close": [Candidate(rate=r) for r in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)],
    "rounds, far apart": [Candidate(rounds=n) for n in (2, 10, 130)],
    "rounds, close": [Candidate(rounds=n) for n in (10, 20, 40, 130, 400)],
}


@dataclass(frozen=True)
class Records:
    """Features with a one behind them [n, hidden + 1], labels, sites and sides of the split."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    site: NDArray[np.int64]
    split: NDArray[np.int64]


def read(folder: Path) -> Records:
    """All sites' records as the base model sees them."""
    plan = Plan.load(folder / "plan.toml", HEAD_ALONE)
    model = ModelCache(device="cpu").for_plan(plan).model
    parts = []
    for number, site in enumerate(load_sites(folder)):
        own = load_records(site, plan, roles=plan.roles, secret=b"2" * 32)
        encoded = model.task.encode(own.examples, model.tokenizer, plan=plan)
        features = compute_frozen(model, encoded).features.numpy()
        ones = np.ones((len(own), 1), dtype=np.float32)
        where = np.full(len(own), number)
        parts.append((np.hstack([features, ones]), encoded.targets, where, own.split))
    x, y, site_of, split = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Records(x, y.astype(np.int64), site_of, split.astype(np.int64))


def trained(
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    one: Candidate,
    rng: np.random.Generator,
    *,
    drawn: float,
    noise: float,
    divisor: float,
) -> NDArray[np.float32]:
    """A head of two labels: clipped sums with noise, Adam, a linear schedule."""
    head = np.zeros((x.shape[1], 2), dtype=np.float32)
    first, second = np.zeros_like(head), np.zeros_like(head)
    lengths = np.linalg.norm(x, axis=1)
    for step in range(one.rounds):
        rows = slice(None) if drawn >= 1.0 else np.flatnonzero(rng.random(len(x)) < drawn)
        seen, truth = x[rows], y[rows]
        logits = seen @ head
        error = np.exp(logits - logits.max(axis=1, keepdims=True))
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(error)), truth] -= 1.0
        norms = np.linalg.norm(error, axis=1) * lengths[rows]
        error *= np.minimum(1.0, one.clip / np.maximum(norms, 1e-9))[:, None]
        total = seen.T @ error + rng.normal(0.0, noise * one.clip, head.shape)
        mean = (total / divisor).astype(np.float32)
        first = 0.9 * first + 0.1 * mean
        second = 0.999 * second + 0.001 * mean**2
        factor = min(1.0, (step + 1) / (0.1 * one.rounds)) * (1.0 - 0.8 * step / one.rounds)
        moved = first / (1.0 - 0.9 ** (step + 1))
        head -= one.rate * factor * moved / (np.sqrt(second / (1.0 - 0.999 ** (step + 1))) + 1e-8)
    return head


def macro_f1(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Over the labels that occur."""
    scores = [
        2.0 * ((found == label) & (truth == label)).sum()
        / ((found == label).sum() + (truth == label).sum())
        for label in (0, 1)
        if (truth == label).any()
    ]  # fmt: skip
    return float(np.mean(scores)) if scores else math.nan


def sigma_of(one: Candidate) -> float:
    """Noise multiplier of the whole federation's step."""
    return calibrate(epsilon=EPSILON, delta=DELTA, rate=RATE, steps=one.rounds)


def reached(records: Records, one: Candidate, seed: int) -> float:
    """What the federation comes to on test records."""
    train, test = records.split == Split.TRAIN, records.split == Split.TEST
    head = trained(
        records.x[train],
        records.y[train],
        one,
        np.random.default_rng(seed),
        drawn=RATE,
        noise=sigma_of(one) * math.sqrt(SITES / SHARERS),
        divisor=RATE * float(train.sum()),
    )
    return macro_f1((records.x[test] @ head).argmax(axis=1), records.y[test])


def votes(records: Records, grid: list[Candidate], *, units: int, seed: int) -> Floats:
    """Each block's vote [blocks, candidates]."""
    rng, scores = np.random.default_rng(seed), []
    train = records.split == Split.TRAIN
    batch, own = RATE * float(train.sum()), units * (1.0 - SCORED)
    for site in range(SITES):
        rows = np.flatnonzero(train & (records.site == site))
        blocks = max(1, len(rows) // units)
        block, scored = rng.integers(0, blocks, len(rows)), rng.random(len(rows)) < SCORED
        for number in range(blocks):
            here, there = rows[(block == number) & ~scored], rows[(block == number) & scored]
            heads = [
                trained(
                    records.x[here], records.y[here], one, rng,
                    drawn=1.0, noise=sigma_of(one) * own / batch, divisor=own,
                )
                for one in grid
            ]  # fmt: skip
            found = [(records.x[there] @ head).argmax(axis=1) for head in heads]
            scores.append([macro_f1(each, records.y[there]) for each in found])
    usable = np.nan_to_num(np.array(scores), nan=-1.0)
    best = usable == usable.max(axis=1, keepdims=True)
    return best / best.sum(axis=1, keepdims=True)


def measured(records: Records, name: str, *, seeds: int) -> dict[str, list[float]]:
    """What candidates reach, the votes on them, and how often a good one is chosen; also printed."""
    rng, grid = np.random.default_rng(0), GRIDS[name]
    truth = np.mean(
        [[reached(records, one, seed) for one in grid] for seed in range(seeds)], axis=0
    )
    print(f"{name}: macro-F1 of the federation {truth.round(3).tolist()}", flush=True)
    found = {"scores": truth.round(4).tolist()}
    for units in (100, 250):
        cast, told = votes(records, grid, units=units, seed=1), []
        found[f"votes, blocks of {units}"] = cast.sum(axis=0).round(1).tolist()
        good = found[f"within .01, blocks of {units}"] = []
        for epsilon in EPSILONS:
            sigma = calibrate(epsilon=epsilon, delta=DELTA, rate=1.0, steps=1)
            noise = sigma * math.sqrt(2.0 * SITES / SHARERS)
            drawn = cast.sum(axis=0) + rng.normal(0.0, noise, (20_000, len(grid)))
            lost = truth.max() - truth[drawn.argmax(axis=1)]
            good.append(float((lost <= 0.01).mean()))
            told.append(f"{epsilon:g}: {good[-1]:.0%} ({lost.mean():.3f})")
        shown = found[f"votes, blocks of {units}"]
        print(f"  {len(cast)} blocks of {units}: votes {shown}; {', '.join(told)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="the hospitals demo, if it is there already")
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of the federation, of each one")
    parser.add_argument(
        "--quick", action="store_true", help="400 records a site, one grid and seed"
    )
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    options = parser.parse_args()
    if options.quick:
        options.grids, options.seeds = ["rounds, far apart"], 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "hospitals"
        if options.folder is None:
            write_hospitals(folder, split="code", rows_per_site=400 if options.quick else None)
        records = read(folder)
    found = {name: measured(records, name, seeds=options.seeds) for name in options.grids}
    if options.json:
        print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
