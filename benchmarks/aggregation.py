"""Aggregation speed and memory: 100 updates of 3 million parameters, beside NumPy's own addition.

The yardstick is ``total += update`` in place on the same float32 vectors, into a float32 sum (the same
bytes) and into a float64 one (a sum as good as ours, which is exact). Peak memory is what Python and
NumPy allocate while a round is folded and finished, counted in adapters (12 MB each).

    python benchmarks/aggregation.py [--quick] [--json] [--strategies fedavg ffa ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import tracemalloc

import numpy as np

from silotune.models.layout import ArrayEntry, Layout
from silotune.plan.plan import Plan
from silotune.strategies import strategy_for
from silotune.strategies.base import Terms

RANK = 8
LINEAR = ("fedavg", "ffa", "rolora", "fedsvd", "fedsa", "norm_bound")
OPTIONS = {"norm_bound": {"bound": 1.0}}


def plan_for(name: str, steps: int) -> Plan:
    raw = {
        "plan": {"name": "speed", "purpose": "speed", "seed": 1},
        "model": {"base": "x", "task": "causal_lm"},
        "lora": {"r": RANK},
        "data": {"dataset": "d"},
        "rounds": {"number": 10, "local_steps": steps},
        "privacy": {"mode": "none", "rate": 0.1},
        "aggregation": {"strategy": name, **OPTIONS.get(name, {})},
    }
    return Plan.from_mapping(raw)


def layout_for(plan: Plan, parameters: int) -> Layout:
    """Layers of 1,024 by 1,024, as many as make so many parameters in A and B."""
    entries = []
    for number in range(max(1, parameters // (2 * RANK * 1024))):
        if not plan.freezes_a:
            entries.append(ArrayEntry(f"layer.{number}.lora_A.weight", (RANK, 1024), "adapter"))
        entries.append(ArrayEntry(f"layer.{number}.lora_B.weight", (1024, RANK), "adapter"))
    return Layout(tuple(entries))


def numpy_seconds(updates: list[np.ndarray], sites: int, dtype: type) -> float:
    total = np.zeros(updates[0].shape, dtype=dtype)
    started = time.process_time()
    for number in range(sites):
        total += updates[number % len(updates)]
    return time.process_time() - started


class Round:
    """One round of a strategy, ready to be folded again and again."""

    def __init__(self, name: str, *, steps: int, parameters: int, sites: int) -> None:
        plan = plan_for(name, steps)
        self.layout = layout_for(plan, parameters)
        self.strategy = strategy_for(plan, layout=self.layout)
        self.terms = [Terms(node=n, site=str(n), declared_units=1000 + n) for n in range(sites)]
        self.strategy.cohort = {one.node: one for one in self.terms}
        rng = np.random.default_rng(0)
        self.adapter = rng.normal(size=self.layout.size, scale=0.02).astype(np.float32)
        size = self.strategy.update_size(1)
        # Ten different ones, so that no update stays in a cache from one site to the next.
        self.updates = [rng.normal(size=size, scale=0.01).astype(np.float32) for _ in range(10)]

    def fold(self) -> float:
        """CPU seconds of folding every reply."""
        self.strategy.begin(1, self.adapter)
        started = time.process_time()
        for number, one in enumerate(self.terms):
            self.strategy.fold(one, self.updates[number % len(self.updates)])
        return time.process_time() - started

    def finish(self) -> float:
        started = time.process_time()
        self.strategy.finish(self.adapter, server_round=1)
        return time.process_time() - started

    def peak_adapters(self) -> float:
        """Most memory that a whole round takes beside adapter and updates, in adapters."""
        tracemalloc.start()
        self.fold()
        self.finish()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak / self.adapter.nbytes


def measure(
    name: str, *, steps: int, parameters: int, sites: int, repeats: int
) -> dict[str, float]:
    """Medians of paired measurements."""
    play = Round(name, steps=steps, parameters=parameters, sites=sites)
    single, double, finishes = [], [], []
    for _ in range(repeats):
        before = numpy_seconds(play.updates, sites, np.float32)
        ours = play.fold()
        after = numpy_seconds(play.updates, sites, np.float32)
        single.append(2 * ours / (before + after))
        double.append(ours / numpy_seconds(play.updates, sites, np.float64))
        finishes.append(play.finish())
    return {
        "fold_over_float32": round(statistics.median(single), 2),
        "fold_over_float64": round(statistics.median(double), 2),
        "finish_ms": round(1000 * statistics.median(finishes), 1),
        "peak_adapters": round(play.peak_adapters(), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 updates of 1 M parameters")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    parser.add_argument("--strategies", nargs="+", default=list(LINEAR), choices=LINEAR)
    options = parser.parse_args()
    sites, parameters, repeats = (20, 10**6, 3) if options.quick else (100, 3 * 10**6, 5)
    numbers = {}
    for name in options.strategies:
        found = measure(name, steps=1, parameters=parameters, sites=sites, repeats=repeats)
        print(
            f"{name:12s} {found['fold_over_float32']:5.2f} times NumPy's in-place addition in float32, "
            f"{found['fold_over_float64']:.2f} times that in float64, "
            f"{found['finish_ms']:6.1f} ms to finish, peak {found['peak_adapters']:.2f} adapters"
        )
        numbers |= {f"{name}.{key}": value for key, value in found.items()}
    if options.json:
        print(json.dumps(numbers))


if __name__ == "__main__":
    sys.exit(main())
