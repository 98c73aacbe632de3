"""Noise taken out of the summed LoRA gradients at the server: macro-F1 on validation records.

The pairs of lora_gains.py and its LoRA row, by code, through the package's own trainers and server. In
the sum of each A and B lies independent Gaussian noise whose variance the server knows, so it may take
some of it out before its step; that is post-processing, free in epsilon. What is done to a matrix:

- svd: its singular values by the optimal shrinker for Frobenius loss (Gavish and Donoho, 2017), which
  drops those that noise alone would give (as in arXiv 2510.01137)
- james-stein: the whole matrix, by what its length has above that of noise
- wiener: the same, by the mean length of all rounds so far

and where:

- sums: a round's sum, before Adam
- momentum: Adam's first moment; the second has the sums as they came
- rounds: the sums of all rounds so far as the rows of one matrix, the last of which counts; Adam's
  second moment has the sums as they came

Each way moves the adapter as far in a round as the plain server does: only where to differs. Adam would
undo a common factor in any case, and a rate of its own need not be searched for each.

A gain is that over the plain server, seed by seed, with its standard error.

    python benchmarks/lora_denoising.py [--ways ...] [--epsilon 3 8] [--seeds 1 2 3] [--rates 0.03]
                                        [--ranks 2] [--cells FILE] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from lora_gains import Cell, Pair, load_codes, write_sites
from numpy.typing import NDArray
from trainings import keep_score, kept_scores, spread

from silotune.client.terms import missing_noise, sigma_for
from silotune.data.records import Split
from silotune.models.layout import Layout, Span, Vector, laid_out
from silotune.plan.plan import Plan
from silotune.simulation import baselines
from silotune.strategies.fedavg import FedAvg
from silotune.strategies.server_optimizer import ServerOptimizer

Matrix = NDArray[np.float32]
WAYS = (
    "plain",
    "svd sums",
    "svd momentum",
    "svd rounds",
    "james-stein momentum",
    "wiener momentum",
)


def shrunk(matrix: Matrix, noise: float) -> Matrix:
    """Without the noise of this standard deviation, by singular values."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    short, long = sorted(matrix.shape)
    ratio, unit = short / long, noise * math.sqrt(long)
    edge = 1.0 + math.sqrt(ratio)
    above = np.maximum(values / unit, edge)
    kept = np.sqrt(np.maximum((above**2 - ratio - 1.0) ** 2 - 4.0 * ratio, 0.0)) / above
    kept[above <= edge] = 0.0  # not the last bits of rounding, either
    return np.asarray((left * (kept * unit)) @ right, dtype=np.float32)


def by_length(matrix: Matrix, noise: float) -> Matrix:
    """Shortened by James and Stein's rule, its positive part."""
    squared = float(np.vdot(matrix, matrix))
    return matrix * np.float32(max(0.0, 1.0 - noise**2 * (matrix.size - 2) / max(squared, 1e-30)))


SHRINK = {"svd": shrunk, "james-stein": by_length}


class DenoisingAdam(ServerOptimizer):
    """The plan's Adam, which takes noise out of A and B on the way."""

    def __init__(self, plan: Plan, *, layout: Layout, way: str, noise: Mapping[str, float]) -> None:
        super().__init__(plan, size=layout.size)
        self._how, self._where = way.split()
        self._noise = noise  # standard deviation by part, in a round's mean
        spans = layout.spans(("A", "B", "head"))
        self._shapes = {s.start: e.shape for s, e in zip(spans, layout.entries, strict=True)}
        self._clean = np.zeros((2, layout.size), dtype=np.float32)  # moments without noise
        self._seen: dict[int, list[Vector]] = defaultdict(list)

    def step(
        self, adapter: Vector, gradient: Vector, spans: Sequence[Span], *, server_round: int
    ) -> Vector:
        updated = super().step(adapter, gradient, spans, server_round=server_round)
        moved, adapted = np.zeros(adapter.size), np.zeros(adapter.size, dtype=bool)
        for span, place in laid_out(spans):
            if span.part != "head":
                own = slice(span.start, span.stop)
                moved[own], adapted[own] = self._direction(span, gradient[place]), True
        length = float(np.linalg.norm((updated - adapter)[adapted]))
        moved *= length / max(float(np.linalg.norm(moved)), 1e-30)
        updated[adapted] = adapter[adapted] - moved[adapted].astype(np.float32)
        return updated

    def _direction(self, span: Span, gradient: Vector) -> NDArray[np.floating]:
        """Where an array goes, up to a factor that all of them share."""
        settings, count, noise = self._settings, self.counts[span.part], self._noise[span.part]
        own = slice(span.start, span.stop)
        size = self.second[own] / (1 - settings.beta2**count)
        if self._where == "momentum":
            kept = 1 - settings.momentum**count
            weights = (1 - settings.momentum) * (1 + settings.momentum**count)
            left = noise * math.sqrt(weights / (1 + settings.momentum) / kept)
            moment = self.first[own] / kept
            if self._how == "wiener":
                signal = max(0.0, float(size.mean()) - noise**2)
                moment = moment * (signal / (signal + left**2))
            else:
                moment = self._without(span, moment, left)
        else:
            first, second = self._clean[:, own]
            clean = self._without(span, gradient, noise)
            first += np.float32(1 - settings.momentum) * (clean - first)
            second += np.float32(1 - settings.beta2) * (clean * clean - second)
            moment = first
            size = second / (1 - settings.beta2**count) if self._where == "sums" else size
        return np.asarray(moment / (np.sqrt(size) + settings.epsilon))

    def _without(self, span: Span, gradient: Vector, noise: float) -> Vector:
        if self._where == "rounds":
            self._seen[span.start].append(gradient)
            return shrunk(np.stack(self._seen[span.start]), noise)[-1]
        return SHRINK[self._how](gradient.reshape(self._shapes[span.start]), noise).ravel()


class Measured(FedAvg):
    """The plan's strategy, which knows the noise of a round's mean.

    `signals` gets, of each A and B and round, the squared length of what is no noise over that of the
    noise; unbiased, so that one without signal is as often below zero.
    """

    def __init__(self, plan: Plan, *, layout: Layout, signals: list[float]) -> None:
        super().__init__(plan, layout=layout)
        self._signals = signals
        self.noise: dict[str, float] = {}

    def apply(self, adapter: Vector, mean: Vector, *, server_round: int) -> Vector:
        variance, mass = defaultdict[str, float](float), 0.0
        for terms in self.cohort.values():
            weight = self.weight(terms)
            sigma = sigma_for(self.plan, terms.declared_units)
            parts = self.sent(self.plan, server_round)
            for part, noise in missing_noise(self.plan, parts, sigma=sigma).items():
                variance[part] += (weight.factor * noise) ** 2
            mass += weight.mass
        self.noise |= {part: math.sqrt(v) / mass for part, v in variance.items()}
        for span, place in laid_out(self.spans(server_round)):
            if span.part != "head":
                own = np.linalg.norm(mean[place]) / self.noise[span.part]
                self._signals.append(float(own**2 / span.size - 1.0))
        return super().apply(adapter, mean, server_round=server_round)


class Denoised(Measured):
    """The same with a server that takes noise out."""

    def __init__(self, plan: Plan, *, layout: Layout, signals: list[float], way: str) -> None:
        super().__init__(plan, layout=layout, signals=signals)
        self.optimizer: ServerOptimizer = DenoisingAdam(
            plan, layout=layout, way=way, noise=self.noise
        )


def score(way: str, cell: Cell, sites: tuple[str, ...], shared: Path) -> tuple[float, float]:
    """Macro-F1 of the LoRA row with one way of taking noise out; signal over noise in A and B."""
    signals: list[float] = []
    made = Measured if way == "plain" else partial(Denoised, way=way)
    with patch.object(baselines, "strategy_for", partial(made, signals=signals)):
        found = cell.score(sites, shared)
    return round(found, 4), math.sqrt(max(0.0, statistics.fmean(signals)))


def cells(options: argparse.Namespace) -> list[Cell]:
    return [
        Cell(
            row="lora",
            epsilon=epsilon,
            split="code",
            seed=seed,
            on=Split.VALIDATION,
            changes={
                "optimizer.site.adapter_lr": rate,
                "lora.r": rank,
                "lora.alpha": 2.0 * rank,
            },
        )
        for epsilon in options.epsilon
        for rank in options.ranks
        for rate in options.rates
        for seed in options.seeds
    ]


def show(row: str, scores: list[float], base: list[float]) -> None:
    gains = [new - old for new, old in zip(scores, base, strict=False)]
    error = spread(gains) / math.sqrt(max(1, len(gains)))
    print(
        f"  {row:60} {statistics.fmean(scores):.3f} ({spread(scores):.3f})"
        + (f", {statistics.fmean(gains):+.4f} ({error:.4f})" if gains else "")
        + f", {len(scores)} seeds",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--epsilon", nargs="+", type=float, default=[3.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.03], help="the adapter's")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2])
    parser.add_argument("--cells", type=Path, help="keep scores here, and go on where they end")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the records, two ways, one seed"
    )
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.ways = [1], ["plain", "svd sums"]
    torch.set_num_threads(1)
    kept = kept_scores(options.cells)
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.cells.with_suffix("") if options.cells else Path(scratch)
        pairs: list[Pair] = load_codes()[:: 20 if options.quick else 2]
        sites = write_sites(folder, [pair for pair in pairs if pair.site])
        for cell in cells(options):
            for way in options.ways:
                told = f"{cell.name}: {way}"
                if told not in kept:
                    started = time.monotonic()
                    kept[told], signal = score(way, cell, sites, folder / "shared")
                    took = time.monotonic() - started
                    print(
                        f"{told}: {kept[told]:.4f}, signal {signal:.3f} of noise ({took:.0f} s)",
                        flush=True,
                    )
                    keep_score(options.cells, told, kept[told])
                changed = ", ".join(f"{value:g}" for value in cell.changes.values())
                found[f"eps {cell.epsilon:g}, {changed}, {way}"].append(kept[told])
    print(f"\n{time.strftime('%Y-%m-%d')}, validation macro-F1: mean (standard deviation), gain")
    for row, scores in found.items():
        show(row, scores, found.get(row.rsplit(", ", 1)[0] + ", plain", []))
    if options.json:
        print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
