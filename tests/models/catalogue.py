"""Every architecture with every task it can have, from its base model to its predictions.

``python -m tests.models.catalogue > docs/models.md`` writes the page; a slow test holds the two together.
"""

import contextlib
import copy
import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from silotune.data.demo import toml_text
from silotune.errors import SilotuneError
from silotune.models.base import load_model
from silotune.models.batching import batches
from silotune.models.task import LoadedModel
from silotune.privacy.clipping import Attached, attach
from silotune.privacy.engine import ClipGroup, DpSgd
from silotune.privacy.noise import SeededNoise
from tests.models.architectures import ARCHITECTURES, Architecture, write_model
from tests.models.model_material import a_plan

PRIVATE = {
    "plan__seed": None,
    "privacy__mode": "record",
    "privacy__epsilon": 8.0,
    "privacy__delta": 1e-5,
    "privacy__clip": 1.0,
}
# Of one to 32 tokens; units have one to three of them.
TEXTS = (
    "rain",
    "acute bronchitis due to streptococcus, initial encounter",
    "chronic kidney disease, stage 4",
    "fracture of the left femur and unspecified injury of the right eye, type 2 diabetes " * 2,
    "eye",
    "what is the capital of france? paris.",
    "type 2 diabetes with neuropathy",
)
UNITS = np.array([0, 1, 1, 2, 3, 2, 2])
MICRO = (1, 2, 3, len(TEXTS))  # most records a micro-batch may have; a unit's stay together
EXACT = 1e-4  # of the sum's length, in float32
# A product of bfloat16 numbers keeps 8 bits; other padding, other rounding, over two layers and back.
ROUNDED = 0.05
Gradients = list[torch.Tensor]


def examples(task: str) -> list[dict[str, str]]:
    """Public examples of a task, of mixed lengths."""
    labels = ("no", "yes", "perhaps")
    return [
        {"text": text, "label": labels[i % 3]}
        if task == "text_classification"
        else {"prompt": text, "response": TEXTS[-1 - i]}
        for i, text in enumerate(TEXTS)
    ]


def spread(model: LoadedModel) -> np.ndarray:
    """Give every trained number a value: where B or the head is zero, gradients hide."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.layout.pack(model.module.trained)


def one_by_one(model: LoadedModel, dtype: torch.dtype) -> list[Gradients]:
    """Each record's gradient by plain autograd, from a batch that it has for itself."""
    encoded = model.task.encode(examples(model.plan.model.task), model.tokenizer, plan=model.plan)
    module = copy.deepcopy(model.module)
    if dtype != torch.float32:  # else it is the module as PEFT made it
        attach(module, private=False, dtype=dtype)
    found = []
    for row in range(len(encoded)):
        module.zero_grad()
        model.task.losses(module, model.task.collate(encoded, [row], model.device)).sum().backward()
        found.append([p.grad.double().clone() for p in module.parameters() if p.requires_grad])
    return found


def clipped(records: Sequence[Gradients], clip: float) -> torch.Tensor:
    """The sum over units, each scaled to the clip norm if it is longer; flat."""
    rows = torch.stack([torch.cat([g.flatten() for g in record]) for record in records])
    units = [rows[torch.from_numpy(unit == UNITS)].sum(0) for unit in np.unique(UNITS)]
    return torch.stack([unit * min(1.0, clip / float(unit.norm())) for unit in units]).sum(0)


def middle(records: Sequence[Gradients]) -> float:
    """A clip norm that cuts half of the units."""
    rows = torch.stack([torch.cat([g.flatten() for g in record]) for record in records])
    norms = [float(rows[torch.from_numpy(unit == UNITS)].sum(0).norm()) for unit in np.unique(UNITS)]
    return float(np.median(norms))


def engine_sum(model: LoadedModel, attached: Attached, *, clip: float, size: int) -> torch.Tensor:
    """The sum that the product's engine makes, in micro-batches of `size`; flat, without noise."""
    encoded = model.task.encode(examples(model.plan.model.task), model.tokenizer, plan=model.plan)
    groups = [ClipGroup("all", tuple(attached.parameters.values()), clip)]
    engine = DpSgd(attached, groups, sigma=1.0, noise=SeededNoise(1))
    for rows in batches(encoded, np.arange(len(encoded)), size=size, units=UNITS):
        numbers = np.unique(UNITS[rows], return_inverse=True)[1]
        engine.accumulate(
            model.task.losses(model.module, model.task.collate(encoded, rows, model.device)),
            units=torch.from_numpy(numbers),
            n_units=int(numbers.max()) + 1,
        )
    total = torch.cat([p.summed_grad.flatten().clone() for p in attached.parameters.values()])
    engine.release()
    return total


def largest_error(model: LoadedModel, dtype: torch.dtype) -> float:
    """Of the clipped sum in all micro-batches, in parts of the one-by-one sum's length."""
    records = one_by_one(model, dtype)
    clip = middle(records)
    expected = clipped(records, clip)
    attached = attach(model.module, private=True, dtype=dtype)
    try:
        sums = [engine_sum(model, attached, clip=clip, size=size) for size in MICRO]
    finally:
        attached.detach()
    return max(float((found - expected).norm() / expected.norm()) for found in sums)


def write_sites(folder: Path, task: str) -> None:
    """Two sites with a dozen records each, of all lengths."""
    rows = examples(task)
    for number, site in enumerate(("alpha", "beta")):
        place = folder / site
        place.mkdir()
        with (place / "records.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            for turn in range(12):
                row = rows[(turn + number) % len(rows)]
                # The number tells texts apart, which would else be the test's and the training's.
                table.writerow({role: value if role == "label" else f"{turn} {value}" for role, value in row.items()})
        columns = "".join(f'{role} = "{role}"\n' for role in rows[0])
        (place / "site.toml").write_text(
            f'name = "{site}"\n[datasets.d]\nformat = "csv"\npath = "records.csv"\nunit = "record"\n'
            f"declared_units = 10\n[datasets.d.columns]\n{columns}"
            "[datasets.d.budget]\nepsilon = 9.0\ndelta = 1e-3\n"
        )


def trained(model: LoadedModel, folder: Path) -> Path:
    """The run directory of two federated rounds of the model's plan, played by the product."""
    settings = {"rounds.number": 2, "plan.seed": 3, "optimizer.site.adapter_lr": 0.01}
    plan = model.plan.override({**settings, "privacy.batch": None, "privacy.rate": 0.5})
    write_sites(folder, plan.model.task)
    path = folder / "plan.toml"
    path.write_text(toml_of(plan))
    with patch.object(run, "WorkerGrid", in_this_process):
        directory = run.simulate(
            path, runs=folder / "runs", settings=Settings(workers=1), listener=lambda event: None
        )
    return directory.root


def toml_of(plan: Plan) -> str:
    """A plan as a file."""
    lines: list[str] = []
    tables = plan.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    for key, value in dotted(tables).items():
        lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def card_of(adapter: Path) -> dict[str, Any]:
    """The names that the code of an adapter's card defines: Transformers and PEFT alone."""
    (code,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.S)
    found: dict[str, Any] = {}
    with contextlib.chdir(adapter):
        exec(code, found)
    return found


def same_elsewhere(directory: Path) -> float:
    """Largest difference between what the trained model and plain PEFT say of the texts."""
    model = load_trained(directory)
    asked = [{k: v for k, v in e.items() if k not in {"label", "response"}} for e in examples(model.plan.model.task)]
    said = model.task.predict(model, asked)
    card = card_of(RunDirectory.open(directory).final_adapter)
    if model.plan.model.task == "causal_lm":
        assert [card["answer"](e["prompt"]) for e in asked] == [p.output for p in said]
        return ...
    shares = card["logits"]([e["text"] for e in asked]).softmax(1)
    ours = torch.tensor([list(p.probabilities.values()) for p in said])
    return float((shares - ours).abs().max())
