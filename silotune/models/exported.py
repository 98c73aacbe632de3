"""A trained model in the forms that other programs load, and whether they answer alike.

The adapter can be folded into the base model's weights, and the whole forward pass, head included, be
written as an ONNX graph, with its weights as 8-bit integers if wanted. Each form is loaded again as its
user would load it, without silotune's own code around the base model, and asked about the same public
texts; what it answers is compared, number by number, with the model that it was made of.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from silotune.errors import ExportRefused, ExtraMissing
from silotune.models import preparation
from silotune.models.adapter import auto_of
from silotune.models.pretrained import load_tokenizer, quiet, told
from silotune.models.task import LoadedModel, TaskModel
from silotune.models.trial import SENTENCES

GRAPH = "model.onnx"
INSTALL = "pip install 'silotune[onnx]'"

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_AT_ONCE = 3  # texts of a batch: of unequal length, so padding is tried too

Answers = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Asked:
    """Public texts as batches of the task, and what the model says of them.

    Attributes
    ----------
    batches : list of dict
        As the task's `collate` makes them.
    answers : list of Tensor
        Float32: logits, or whatever the model's forward pass gives.
    """

    batches: Sequence[Mapping[str, Tensor]]
    answers: Sequence[Tensor]

    @classmethod
    def of(cls, model: LoadedModel) -> Asked:
        """Ask a model about its plan's public texts, or about fixed ones where the plan has none."""
        task, plan = model.task, model.plan
        texts = plan.model.centre_texts or SENTENCES
        examples = [task.example(text, number=n, plan=plan) for n, text in enumerate(texts)]
        encoded = task.encode(examples, model.tokenizer, plan=plan)
        batches = [
            task.collate(encoded, range(start, min(start + _AT_ONCE, len(texts))), model.device)
            for start in range(0, len(texts), _AT_ONCE)
        ]
        with model.module.inference():
            return cls(batches, [model.module(batch).float().cpu() for batch in batches])

    def difference(self, answers: Answers) -> float:
        """The largest difference of any number, in parts of the largest number."""
        worst, largest = 0.0, max(float(answer.abs().max()) for answer in self.answers)
        with torch.no_grad():
            for batch, own in zip(self.batches, self.answers, strict=True):
                other = answers(batch).float().cpu()
                if other.shape != own.shape or not other.isfinite().all():
                    return float("inf")
                worst = max(worst, float((other - own).abs().max()))
        return worst / largest if largest else worst


@contextmanager
def _in_place_of(module: TaskModel, backbone: Any) -> Iterator[None]:
    """Have the head stand on another backbone for a while."""
    own, prefix = module.peft, module.prefix
    module.peft, module.prefix = backbone, None
    try:
        with module.inference():
            yield
    finally:
        module.peft, module.prefix = own, prefix


def with_backbone(model: LoadedModel, backbone: nn.Module) -> Answers:
    """What the model's head says on another backbone, such as one that was loaded by Transformers."""

    def answers(batch: Mapping[str, Tensor]) -> Tensor:
        with _in_place_of(model.module, backbone.to(model.device).eval()):
            found: Tensor = model.module(batch)
            return found

    return answers


def loaded_by_peft(model: LoadedModel, folder: Path, *, base: Path) -> nn.Module:
    """The adapter in `folder` on its base model, by Transformers and PEFT alone."""
    with quiet():
        backbone: nn.Module = auto_of(model).from_pretrained(base, dtype=torch.float32)
        if model.plan.lora.target_modules == "none":
            return backbone
        loaded: nn.Module = PeftModel.from_pretrained(backbone, folder)
    return loaded


def write_merged(model: LoadedModel, folder: Path, *, base: Path) -> None:
    """Fold the adapter into the weights and write them; `model` is changed by it.

    With them go the tokenizer, or what says how images are prepared, of the base model's folder.

    Raises
    ------
    ExportRefused
        The weights can't hold it.
    """
    module = model.module
    if module.prefix is not None:
        module.prefix.remove()
        module.prefix = None
    merged = module.peft
    if model.plan.lora.target_modules != "none":
        merged = _merged(merged)
        module.peft = merged
    with quiet():
        merged.save_pretrained(folder)
        if model.plan.task.sees:
            shutil.copyfile(base / preparation.FILE, folder / preparation.FILE)
            return
        load_tokenizer(Path(model.tokenizer.name_or_path)).save_pretrained(folder)


def _merged(peft: Any) -> Any:
    try:
        return peft.merge_and_unload(safe_merge=True)
    except Exception as exc:
        raise ExportRefused(f"PEFT can't fold this adapter into the weights: {told(exc)}") from exc


def loaded_by_transformers(model: LoadedModel, folder: Path) -> nn.Module:
    """The merged model in `folder`, by Transformers alone."""
    with quiet():
        loaded: nn.Module = auto_of(model).from_pretrained(folder, dtype=torch.float32)
    return loaded


class _Graph(nn.Module):
    """A model's forward pass as a function of tensors alone."""

    def __init__(self, module: TaskModel, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits: [n, outputs] of a head, [n, tokens, vocabulary] of a language model."""
        batch = dict(zip(self.names, tensors, strict=True))
        if self.module.head is not None:
            found: Tensor = self.module(batch)
            return found
        logits: Tensor = self.module.peft(**batch, use_cache=False).logits
        return logits


def write_graph(model: LoadedModel, folder: Path, *, like: Mapping[str, Tensor]) -> Answers:
    """Write ``model.onnx`` of a merged model, and give what ONNX Runtime makes of a batch.

    Parameters
    ----------
    model : LoadedModel
        As `write_merged` left it.
    like : mapping of str to Tensor
        A batch, for the exporter to look at; others may be of another size.

    Raises
    ------
    ExtraMissing
        onnx, onnxscript or onnxruntime is not installed.
    ExportRefused
        The exporter can't write this model.
    """
    try:
        import onnxruntime  # noqa: F401 - asked for before the exporter works for minutes
        import onnxscript  # noqa: F401
    except ImportError as exc:
        raise ExtraMissing(f"{exc.name} is not installed", remedy=INSTALL) from exc
    names = [name for name in _INPUTS if name in like]
    if not names:
        raise ExportRefused(f"{model.plan.model.task} reads no token ids")
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with model.module.inference(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                _Graph(model.module, names).eval(),
                tuple(like[name] for name in names),
                folder / GRAPH,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(tuple(sizes for _ in names),),
                dynamo=True,
                verbose=False,
            )
        except Exception as exc:
            raise ExportRefused(f"PyTorch can't write this model as ONNX: {told(exc)}") from exc
    return by_runtime(folder / GRAPH)


def by_runtime(path: Path) -> Answers:
    """What ONNX Runtime makes of a batch; of a language model at the positions it is asked for."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def answers(batch: Mapping[str, Tensor]) -> Tensor:
        given = {name: batch[name].cpu().numpy() for name in names}
        found = torch.from_numpy(session.run(None, given)[0])
        return found[:, batch["kept"].cpu()] if "kept" in batch else found

    return answers


def quantise_graph(folder: Path) -> Answers:
    """Replace ``model.onnx`` by one with 8-bit weights, activations quantised as they come."""
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = folder / f"whole-{GRAPH}"
    for path in folder.glob(f"{GRAPH}*"):  # large weights lie beside the graph
        shutil.move(path, whole if path.name == GRAPH else path.with_name(f"{GRAPH}.data"))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises to prepare the graph, which changes no answer
    try:
        quantize_dynamic(whole, folder / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
    finally:
        root.setLevel(level)
    for path in (whole, folder / f"{GRAPH}.data"):
        path.unlink(missing_ok=True)
    (folder / "int8.onnx").rename(folder / GRAPH)
    return by_runtime(folder / GRAPH)
