"""Aggregation strategies side by side on the hospitals demo: macro-F1, bytes, server seconds.

A grid of small trainings: every strategy, without privacy and at eps 8 and 2 per record, with one local
step a round and with four, on the seven hospitals as they are (non-IID) and on the same records dealt
at random (IID), three seeds. The head-only probe under the same settings and the base rate (always the
most frequent class) stand beside them. Robust rules are run again with two poisoned sites of the seven,
which send the opposite of their update ten times over; and both ways with sites that are as alike as can
be, the head alone trained on all the records of the IID split in each step. A strategy that a setting
refuses, or under which it is another one, is not run there. Small means: 600 records a site, LoRA on
the last layer, its input kept in memory; scores of the demo at full size are in benchmarks/accuracy.py.
The server's time is CPU time.

    python benchmarks/strategies.py [--quick] [--json] [--results grid.json] [--workers 2]

Results are written as they come, seeds in the outer loop; a grid that was cut goes on where it stopped.
A training that fails is named at the end and costs the grid no more than its own cell.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from strategies_grid import COMMON, POISON, Case, grid
from tuned import tuned

from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.data.demo import write_hospitals
from silotune.data.partition import Iid, partition_file
from silotune.data.records import Split
from silotune.data.site import BudgetConfig, SiteConfig, load_sites
from silotune.models.choices import Choices, choose
from silotune.models.layout import initial_adapter
from silotune.plan.plan import Plan
from silotune.simulation.baselines import in_the_clear
from silotune.simulation.outcome import metrics_of
from silotune.simulation.program import score
from silotune.strategies import strategy_for
from silotune.strategies.base import Terms

# --- data ---


def prepare(folder: Path, *, rows: int) -> None:
    """The hospitals, and the same records dealt at random to as many sites."""
    demo = write_hospitals(folder / "hospitals", rows_per_site=rows)
    sites = load_sites(folder / "hospitals")
    lines: list[list[str]] = []
    for site in sites:
        with (site.folder / "records.csv").open(newline="", encoding="utf-8") as file:
            header, *own = csv.reader(file)
        lines += own
    whole = folder / "whole.csv"
    with whole.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    offered = sites[0].dataset("diagnoses")
    partition_file(
        whole,
        folder / "iid",
        partitioner=Iid(len(sites)),
        columns=offered.columns.by_role(),
        budget=BudgetConfig(epsilon=100.0, delta=1e-4),
        dataset="diagnoses",
    )
    (folder / "plan.toml").write_text(demo.plan.read_text("utf-8"), "utf-8")


# --- a training ---


@lru_cache(maxsize=1)
def warm_model(choices: str, folder: str) -> ModelCache:
    return ModelCache(Choices(**json.loads(choices)), shared=Path(folder) / "shared")


@cache
def material(folder: str, base: str) -> dict[str, object]:
    """Records and tokens by site, read once a process: no strategy changes them."""
    del folder, base
    return {}


def parts_of(
    case: Case, plan: Plan, folder: Path, models: ModelCache, state: Path
) -> list[SiteRun]:
    kept, parts = material(str(folder), case.records), []
    for number, site in enumerate(load_sites(folder / case.records)):
        # A site's own budget is not what is measured here.
        offered = site.dataset("diagnoses").model_copy(
            update={"budget": BudgetConfig(epsilon=100.0, delta=1e-4)}
        )
        roomy = site.model_copy(update={"datasets": {"diagnoses": offered}})
        part = SiteRun(roomy, state=state / str(number), plan=plan, run="grid", models=models)
        if site.name not in kept:
            kept[site.name] = part.training.records, part.training.encoded
        part.training.records, part.training.encoded = kept[site.name]
        part.join()  # its ledger reserves what the rounds will be charged
        parts.append(part)
    return parts


def run(job: tuple[Case, str, str]) -> tuple[Case, dict[str, float]]:
    case, folder, choices = job
    started, cpu = time.monotonic(), time.process_time()
    plan = case.plan(tuned(in_the_clear(Plan.load(Path(folder) / "plan.toml"))))
    with tempfile.TemporaryDirectory() as state:
        parts = parts_of(case, plan, Path(folder), warm_model(choices, folder), Path(state))
        found = train(plan, parts, poisoned=case.liars)
    found |= {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu}
    return case, found


def train(plan: Plan, parts: list[SiteRun], *, poisoned: int) -> dict[str, float]:
    """Train, score on everybody's test records, and count what would have travelled."""
    layout = parts[0].layout
    terms = [
        Terms(node=n, site=part.site.name, declared_units=part.dataset.declared_units)
        for n, part in enumerate(parts)
    ]
    strategy = strategy_for(plan, layout=layout)
    strategy.cohort = {one.node: one for one in terms}
    adapter, up, down, server = initial_adapter(layout, plan), 0, 0, 0.0
    for number in range(1, plan.rounds.number + 1):
        server -= time.process_time()
        strategy.begin(number, adapter)
        server += time.process_time()
        for one, part in zip(terms, parts, strict=True):
            update = part.train(adapter, number).array_records["update"]["flat"].numpy()
            update = POISON * update if one.node < poisoned else update
            up, down = up + update.nbytes, down + adapter.nbytes
            server -= time.process_time()
            strategy.fold(one, update)
            server += time.process_time()
        server -= time.process_time()
        adapter = strategy.finish(adapter, server_round=number)
        server += time.process_time()
    found = {"f1": macro_f1(plan, parts, [adapter] * len(parts))}
    own = [part.updates.personal(adapter, before=plan.rounds.number + 1) for part in parts]
    if own[0] is not None:
        found["f1_personal"] = macro_f1(plan, parts, own)
    rounds = plan.rounds.number * len(parts)
    found |= {"up": up / rounds, "down": down / rounds}
    return found | {"server_ms": 1000 * server / plan.rounds.number}


def macro_f1(plan: Plan, parts: list[SiteRun], adapters: list[np.ndarray]) -> float:
    frozen = plan.optimizer.site.head_rounds >= plan.rounds.number
    counts = [
        score(part.training, adapter, split=Split.TEST, frozen=frozen)
        for part, adapter in zip(parts, adapters, strict=True)
    ]
    return metrics_of(plan, sum(counts))["macro_f1"]


def base_rate(folder: Path, split: str) -> float:
    """Macro-F1 of always saying the most frequent class of the test records."""
    plan = tuned(in_the_clear(Plan.load(folder / "plan.toml"))).override(
        {**COMMON, "rounds.min_sites": 1}
    )
    with tempfile.TemporaryDirectory() as state:
        tally: dict[str, int] = defaultdict(int)
        for site in load_sites(folder / split):
            part = SiteRun(site, state=Path(state), plan=plan, run="r", models=ModelCache())
            for row in held_out(part, site):
                tally[row] += 1
    most = max(tally.values())
    share = most / sum(tally.values())
    return (2 * share / (1 + share)) / len(tally)


def held_out(part: SiteRun, site: SiteConfig) -> list[str]:
    from silotune.data.records import load_records

    roles = frozenset({"text", "label"})
    records = load_records(site, part.plan, roles=roles, secret=part.secret)
    return [records.examples[row]["label"] for row in records.rows(Split.TEST)]


# --- the whole ---


def calm() -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Results by case key; those in the results file are not run again."""
    path = Path(options.results) if options.results else None
    found: dict[str, dict[str, float]] = (
        json.loads(path.read_text()) if path and path.exists() else {}
    )
    prepare(folder, rows=150 if options.quick else 600)
    base = tuned(in_the_clear(Plan.load(folder / "plan.toml")))
    choices = json.dumps(asdict(choose(base)), sort_keys=True)
    for split in ("hospitals", "iid"):
        found[f"base rate|{split}"] = {"f1": base_rate(folder, split)}
    cases = [case for case in grid(quick=options.quick) if case.key not in found]
    jobs = [(case, str(folder), choices) for case in cases]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context, initializer=calm) as pool:
        pending = {pool.submit(run, job): job[0].key for job in jobs}
        failed = []
        for done in as_completed(pending):
            key = pending[done]
            if error := done.exception():
                failed.append(key)
                print(f"{key} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            found[key] = done.result()[1]
            shown = {name: round(value, 4) for name, value in found[key].items()}
            print(key, shown, flush=True)
            if path:
                part = path.with_suffix(".part")
                part.write_text(json.dumps(found, indent=1, sort_keys=True))
                part.replace(path)
    if failed:
        sys.exit(f"{len(failed)} trainings failed: {', '.join(failed)}")
    return found


def summary(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation over the seeds, by method, epsilon, steps and split."""
    scores: dict[str, list[float]] = defaultdict(list)
    for key, values in found.items():
        name = key.rpartition("|")[0] if not key.startswith("base rate") else key
        scores[name].append(values["f1"])
        if "f1_personal" in values:
            scores[f"{name}|personal"].append(values["f1_personal"])
    numbers = {}
    for name, values in scores.items():
        numbers[name] = round(statistics.fmean(values), 4)
        numbers[f"{name}|sd"] = round(statistics.stdev(values), 4) if len(values) > 1 else 0.0
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="six trainings on 150 records a site")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    parser.add_argument("--results", help="JSON file that grows with the grid, and is resumed from")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    calm()
    with tempfile.TemporaryDirectory() as folder:
        numbers = summary(measure(options, Path(folder)))
    for name, value in sorted(numbers.items()):
        if not name.endswith("|sd"):
            print(f"{name:44s} {value:.3f} ({numbers[f'{name}|sd']:.3f})")
    if options.json:
        print(json.dumps(numbers))


if __name__ == "__main__":
    sys.exit(main())
