"""Every architecture with every task it can have, from its base model to its predictions.

``python -m tests.models.catalogue > docs/models.md`` writes the page; slow tests hold it to this.
"""

import contextlib
import copy
import csv
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from silotune.errors import SilotuneError
from silotune.models.base import load_model
from silotune.models.batching import batches, record_of
from silotune.models.pretrained import quiet
from silotune.models.task import LoadedModel
from silotune.models.tasks import get_task
from silotune.plan.plan import Plan, dotted
from silotune.privacy.clipping import Attached, attach
from silotune.privacy.engine import ClipGroup, DpSgd
from silotune.privacy.noise import SeededNoise
from silotune.rounds.trained import find_trained
from tests.models.architectures import ARCHITECTURES, Architecture, write_model
from tests.models.model_material import a_plan
from tests.whole_run import play_plan

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
# In bfloat16, against the same rounded products one by one. What differs is the order of sums only.
ROUNDED = 5e-3
Gradients = list[torch.Tensor]


def examples(plan: Plan) -> list[dict[str, str]]:
    """Public examples of a plan's task, of mixed lengths."""
    task = get_task(plan)
    found = [dict(task.example(text, number=i, plan=plan)) for i, text in enumerate(TEXTS)]
    for example, text in zip(found, reversed(TEXTS), strict=True):
        if "response" in example:
            example["response"] = text
    return found


def spread(model: LoadedModel) -> np.ndarray:
    """Give every trained number a value: where B or the head is zero, gradients hide."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.layout.pack(model.module.trained)


def one_by_one(model: LoadedModel, dtype: torch.dtype) -> list[Gradients]:
    """Each record's gradient by plain autograd, from a batch that it has for itself."""
    encoded = model.task.encode(examples(model.plan), model.tokenizer, plan=model.plan)
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
    norms = [
        float(rows[torch.from_numpy(unit == UNITS)].sum(0).norm()) for unit in np.unique(UNITS)
    ]
    return float(np.median(norms))


def engine_sum(model: LoadedModel, attached: Attached, *, clip: float, size: int) -> torch.Tensor:
    """The sum that the product's engine makes, in micro-batches of `size`; flat, without noise."""
    encoded = model.task.encode(examples(model.plan), model.tokenizer, plan=model.plan)
    groups = [ClipGroup("all", tuple(attached.parameters.values()), clip)]
    engine = DpSgd(attached, groups, sigma=1.0, noise=SeededNoise(1))
    for rows in batches(encoded, np.arange(len(encoded)), size=size, units=UNITS):
        numbers = np.unique(UNITS[rows], return_inverse=True)[1]
        batch = model.task.collate(encoded, rows, model.device)
        engine.accumulate(
            model.task.losses(model.module, batch),
            units=torch.from_numpy(numbers)[record_of(batch, len(rows))],  # of each window
            n_units=int(numbers.max()) + 1,
        )
    total = torch.cat([p.summed_grad.flatten().clone() for p in attached.parameters.values()])
    engine.release()
    return total


def largest_error(model: LoadedModel, dtype: torch.dtype) -> float:
    """Of the clipped sum in all micro-batches, in parts of the one-by-one sum's length."""
    with patch("silotune.privacy.clipping._SMALLEST_CAST", 0):  # frozen layers are rounded, too
        return _largest_error(model, dtype)


def _largest_error(model: LoadedModel, dtype: torch.dtype) -> float:
    records = one_by_one(model, dtype)
    clip = middle(records)
    expected = clipped(records, clip)
    attached = attach(model.module, private=True, dtype=dtype)
    try:
        sums = [engine_sum(model, attached, clip=clip, size=size) for size in MICRO]
    finally:
        attached.detach()
    return max(float((found - expected).norm() / expected.norm()) for found in sums)


def write_sites(folder: Path, plan: Plan) -> None:
    """Two sites with a dozen records each, of all lengths."""
    task = get_task(plan)
    for number, site in enumerate(("alpha", "beta")):
        place = folder / site
        place.mkdir(parents=True)
        with (place / "records.csv").open("w", newline="") as file:
            # The number tells texts apart: no record is another one's look-alike.
            rows = [
                task.example(
                    f"{turn} {TEXTS[(turn + number) % len(TEXTS)]}", number=turn, plan=plan
                )
                for turn in range(12)
            ]
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        columns = "".join(f'{role} = "{role}"\n' for role in rows[0])
        (place / "site.toml").write_text(
            f'name = "{site}"\n[datasets.d]\nformat = "csv"\npath = "records.csv"\nunit = "record"\n'
            f"declared_units = 10\n[datasets.d.columns]\n{columns}"
            "[datasets.d.budget]\nepsilon = 9.0\ndelta = 1e-3\n"
        )


ROUNDS = {
    "plan__seed": 3,
    "rounds__number": 2,
    "rounds__min_sites": 2,
    "optimizer__site__head_rounds": 0,
    "optimizer__site__adapter_lr": 0.01,
    "optimizer__site__head_lr": 0.1,
    "privacy__batch": None,
    "privacy__rate": 0.5,
    "privacy__delta": 1e-4,
}


def federated(folder: Path, base: Path, architecture: Architecture, task: str) -> Path:
    """The run directory of two private rounds with two sites, as `silotune simulate` plays them."""
    plan = a_plan(base, task, **{**PRIVATE, **ROUNDS, **architecture.settings})
    write_sites(folder, plan)
    tables = plan.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    path = folder / "plan.toml"
    path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in dotted(tables).items()))
    return play_plan(path, runs=folder / "runs").root


def card_of(adapter: Path) -> dict[str, Any]:
    """What the code of an adapter's card defines: Transformers and PEFT alone."""
    (code,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.S)
    found: dict[str, Any] = {}
    with contextlib.chdir(adapter):
        exec(code, found)
    return found


def require_same_elsewhere(directory: Path) -> None:
    """The trained model answers, and plain PEFT gives the same numbers and the same answers."""
    trained = find_trained(directory)
    model, plan = trained.load(device="cpu"), trained.plan
    card = card_of(trained.adapter)
    asked = [{role: example[role] for role in plan.task.reads} for example in examples(plan)]
    said = model.task.predict(model, asked)
    if plan.task.each_token:
        require_same_tokens(model, card["logits"])
        return
    if not plan.task.generates:
        theirs = card["logits"](list(TEXTS)).softmax(1)
        ours = torch.tensor([list(p.probabilities.values()) for p in said])
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        assert len(ours.unique()) > 3, "nothing was learned, so equal numbers show nothing"
        return
    encoded = model.task.encode(examples(plan), model.tokenizer, plan=plan)
    batch = model.task.collate(encoded, range(len(TEXTS)), model.device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with model.module.inference():
        ours, theirs = model.module(batch), card["model"](**inputs).logits[:, batch["kept"]]
    real = batch["labels"] != -100
    torch.testing.assert_close(theirs[real], ours[real], rtol=1e-4, atol=1e-4)
    assert [card["answer"](example["prompt"]) for example in asked] == [p.output for p in said]


def require_same_tokens(model: LoadedModel, logits: Any) -> None:
    """Plain PEFT says the same of every token of a text that one window holds."""
    encoded = model.task.encode(examples(model.plan), model.tokenizer, plan=model.plan)
    compared = 0
    for row, text in enumerate(TEXTS):
        batch = model.task.collate(encoded, [row], model.device)
        if len(batch["input_ids"]) == 1:
            with model.module.inference():
                ours = model.module(batch)[0]
            torch.testing.assert_close(logits(text)[0], ours, rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared >= len(TEXTS) - 1


@dataclass(frozen=True)
class Entry:
    """What became of an architecture with a task."""

    architecture: Architecture
    task: str
    adapted: str
    every_layer: str
    few_bits: str
    verdict: str

    @property
    def line(self) -> str:
        """Its line of the page."""
        name, kind = self.architecture.name, self.architecture.model_type
        cells = (name, f"`{kind}`", self.task, self.adapted, self.every_layer, self.few_bits)
        return f"| {' | '.join(cells)} | {self.verdict} |"


def adapted_in(model: LoadedModel) -> str:
    """Names of the layers that have an adapter."""
    layers = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in model.module.trained if "lora" in n}
    return ", ".join(f"`{layer}`" for layer in sorted(layers))


def refused(exc: SilotuneError) -> str:
    """What an error says, without measured numbers and what a library said behind it."""
    said = re.sub(r" changed by \S+ ", " changes ", exc.detail)
    return f"{exc.code} {re.split(r': the layer|: [0-9]+%| [(]', said, maxsplit=1)[0]}"


def require_exact(base: Path, task: str, **settings: Any) -> LoadedModel:
    """Load a model as the product does, and hold its sums to those of plain autograd."""
    plan = a_plan(base, task, **{**PRIVATE, **settings})
    model = load_model(plan, device="cpu", attention="eager", dtype="float32")
    spread(model)
    for dtype, tolerance in ((torch.float32, EXACT), (torch.bfloat16, ROUNDED)):
        error = largest_error(model, dtype)
        assert error <= tolerance, f"{base.name}, {dtype}: the clipped sum is off by {error:.2g}"
    return model


def answer_to(base: Path, task: str, **settings: Any) -> str:
    """ "yes" if a model is exact under other settings, or why the product refuses them."""
    try:
        require_exact(base, task, **settings)
    except SilotuneError as exc:
        return refused(exc)
    return "yes"


def examined(architecture: Architecture, task: str, folder: Path) -> Entry:
    """Take an architecture all the way; what the product refuses is told, what it gets wrong raises."""
    own = architecture.settings
    right, left = (
        write_model(architecture, folder / side, task=task, padding_side=side)
        for side in ("right", "left")
    )
    every_layer = answer_to(right, task, **{**own, "lora__target_modules": "all-linear"})
    kinds = {
        kind: answer_to(right, task, **own, model__quantization=kind) for kind in ("int8", "nf4")
    }
    few_bits = "; ".join(dict.fromkeys(kinds.values()))
    try:
        model = require_exact(right, task, **own)
    except SilotuneError as exc:
        reason = refused(exc)  # said once
        others = ("" if told == reason else told for told in (every_layer, few_bits))
        return Entry(architecture, task, "", *others, reason)
    require_exact(left, task, **own)
    require_same_elsewhere(federated(folder / "federation", right, architecture, task))
    return Entry(architecture, task, adapted_in(model), every_layer, few_bits, "trains")


PAIRS = [
    (architecture, task)
    for architecture in ARCHITECTURES
    for task in ("text_classification", *["causal_lm"] * architecture.generates)
]
PAIRS.insert(1, (ARCHITECTURES[0], "token_classification"))
HEAD = f"""# Models

Which architectures train, with which task. Each line was made by a test that builds the architecture
as a tiny random model and takes it all the way. Under privacy, the sum of the clipped gradients of
units of one to three records is held to one-by-one autograd of Transformers and PEFT (within {EXACT:g}
of its length in float32, {ROUNDED:g} in bfloat16), for texts of one to 32 tokens, micro-batches of 1, 2,
3 and all records, and tokenizers that pad on either side. Two private rounds of a federation are
played; and the adapter, loaded by PEFT alone, gives the same numbers and answers as `silotune predict`.

The product has no list of these names. Whatever a plan names is tried on public texts when it is
loaded, by `silotune plan check`, `silotune simulate` and each site: a model that mixes records, sees
the tokens that it is to predict, or has a layer without exact gradients of single records is refused,
with the layer's name ([errors.md](errors.md): ST-303 and its neighbours).

`auto` names the layers that `lora.target_modules = "auto"` adapts. `all-linear` and few bits
(`model.quantization`, "int8" and "nf4") say whether these settings give exact gradients too, or why
they are refused. Without privacy most of what is refused with ST-303 may be trained.

Backbones of images have tests of their own, to the same standard: ViT, DeiT and DINOv2 (`q_proj`,
`v_proj`), Swin (`fc1`, `fc2`), ConvNeXt (`pwconv1`, `pwconv2`), and of a ResNet the head alone, its
batch norms frozen; a batch norm in training mode is refused.

| architecture | `model_type` | task | `auto` adapts | `all-linear` | few bits | |
|---|---|---|---|---|---|---|
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, quiet():
        lines = [
            examined(architecture, task, Path(folder) / f"{number}").line
            for number, (architecture, task) in enumerate(PAIRS)
        ]
    print(HEAD + "\n".join(lines))
