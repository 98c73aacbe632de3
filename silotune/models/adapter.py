"""Adapters as live parameters, and as folders that PEFT alone can load.

Names are those of PEFT's saved files, as in `Layout`, so that saving and loading rename nothing. Beside
the weights lie the settings that the adapter was made with and a card that says how to load it: with
both it can be used with Transformers and PEFT alone, without silotune.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from silotune.errors import AdapterMismatch, PlanInvalid
from silotune.models.batching import PROMPT_END, end_ids, leading_ids, padding_id, pair_end
from silotune.models.chat import ChatFormat
from silotune.models.layout import ArrayEntry, Layout, Vector, arrays_sha256, saved_name
from silotune.models.pretrained import auto_class
from silotune.models.task import LoadedModel, TaskModel
from silotune.plan.plan import Plan

MATRICES, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
HEAD, SETTINGS = "head.safetensors", "silotune.json"
PLAN = "plan.json"
"""The plan's canonical text: with it a folder can be loaded by `read_plan` and nothing else."""

_POOLED = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "first": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(hidden)), mask[..., 0].sum(1) - 1]",
}

_POOLED_PARTS = {"mean": "hidden.mean(1)", "first": "hidden[:, 0]"}

_ADAPTER_FILES = "`adapter_model.safetensors` and `adapter_config.json` are in PEFT's own format; "

_COSINES = """
    turns = features @ head["frequencies"].T + head["phases"]
    features = torch.cos(turns) * settings["feature_scale"] * (2 / len(head["phases"])) ** 0.5"""


def meaning(plan: Plan) -> dict[str, Any]:
    """Settings without which an adapter's numbers mean something else."""
    shared: dict[str, Any] = {"task": plan.model.task}
    if plan.task.generates:
        if (chat := plan.model.chat) is None:
            return shared | {"prompt_end": PROMPT_END}
        return shared | {"prompt_end": "", "chat": chat.model_dump(mode="json")}
    found = shared | {
        "labels": list(plan.model.labels),
        "pooling": plan.model.pooling,
        "feature_scale": plan.model.feature_scale,
    }
    if plan.model.multi_label:
        found["multi_label"] = True
    if (target := plan.model.target) is not None:
        found["target"] = {"lower": target.lower, "upper": target.upper}
    if (features := plan.model.head_features) is not None:
        found["head_features"] = features.model_dump(mode="json")
    return found


def settings(plan: Plan, *, tokens: dict[str, Any]) -> dict[str, Any]:
    """Content of ``silotune.json``: `meaning`, `tokens`, where it came from, the longest input."""
    return (
        meaning(plan)
        | tokens
        | {
            "format": 1,
            "base": plan.model.base,
            "base_sha256": plan.model.sha256,
            "max_length": plan.data.max_length,
            "plan": plan.plan.name,
            "plan_sha256": plan.sha256,
        }
    )


def auto_of(model: LoadedModel) -> Any:
    """Transformers' class that builds the base model."""
    return auto_class(model.module.backbone.config, model.plan)


def readme(plan: Plan, description: str, *, auto: str) -> str:
    """The adapter card: what it is, how private its training was, and code that loads it.

    `auto` is the name of Transformers' class that builds the base model.
    """
    adapted = plan.lora.target_modules != "none"
    pooled = _POOLED_PARTS if plan.task.sees else _POOLED
    code = _template(plan.task.card or plan.model.task).substitute(
        card_code(plan),
        pooled=pooled[plan.model.pooling],
        auto=auto,
        imports="from peft import PeftModel\n" if adapted else "",
        model="PeftModel.from_pretrained(encoder, folder)" if adapted else "encoder",
        asked="prompt" if plan.model.chat is None else "prompt.strip()",
    )
    return _template("card").substitute(
        base=plan.model.base,
        tag=plan.task.tag,
        name=plan.plan.name,
        purpose=plan.plan.purpose.strip(),
        description=description,
        privacy=_privacy(plan) + _ancestor(plan),
        sha256=plan.sha256,
        kind="A LoRA adapter" if adapted else "A head",
        files=_ADAPTER_FILES if adapted else "",
        head=f"`head.safetensors` holds {_head_file(plan)}; " if plan.task.has_head else "",
        code=code,
    )


_ANSWERS = {
    "label": """    return [settings["labels"][row] for row in logits($arguments).argmax(1)]""",
    "labels": """    shares = logits($arguments).sigmoid().tolist()
    return [[n for n, p in zip(settings["labels"], row) if p >= 0.5] for row in shares]""",
    "value": """    low, high = settings["target"]["lower"], settings["target"]["upper"]
    return (low + (high - low) * logits($arguments)[:, 0].double().sigmoid()).tolist()""",
}
_TYPES = """, **(
        {"token_type_ids": batch["token_type_ids"]} if settings["token_types"] else {}
    )"""


def card_code(plan: Plan) -> dict[str, str]:
    """What the code of a card has in its places."""
    pair = len(plan.task.reads) > 1
    arguments = "texts, others" if pair else "texts"
    answer = Template(_ANSWERS.get(plan.task.target, "")).substitute(arguments=arguments)
    return {
        "cosines": _COSINES if plan.model.head_features else "",
        "arguments": arguments,
        "given": '[text + settings["pair_end"] for text in texts],\n        others'
        if pair
        else "texts",
        "types": _TYPES if pair else "",
        "answer": answer,
    }


def _head_file(plan: Plan) -> str:
    """What lies in the head's file."""
    if (features := plan.model.head_features) is None:
        return "the head and the feature centre"
    return (
        f"the head, the feature centre, and the frequencies and phases of the {features.number:,} fixed "
        "random cosines that the head sees (public, drawn from the plan, not trained)"
    )


def _template(name: str) -> Template:
    text = (
        resources.files("silotune.models").joinpath("templates", f"{name}.txt").read_text("utf-8")
    )
    return Template(text)


def _ancestor(plan: Plan) -> str:
    """Which adapter the run went on with."""
    if (start := plan.lora.start) is None:
        return ""
    return (
        f" It went on with the adapter `{start.sha256}` of an earlier run ({start.adapter}): what that "
        "run cost a site adds up with this one's, and the site's certificate says to what."
    )


def _privacy(plan: Plan) -> str:
    privacy = plan.privacy
    if plan.trusts_coordinator and plan.plan.seed is None:
        return (
            f"Trained under client-level differential privacy, ε = {privacy.epsilon:g} at "
            f"δ = {privacy.delta:g} for all records of a site together; the coordinator added the noise."
        )
    if not plan.private and not plan.trusts_coordinator:
        return "Trained without differential privacy."
    if plan.plan.seed is not None:
        return "Not private: the noise of this run came from a seed."
    unit = f"each {privacy.unit}" if plan.per_unit else "all records of a site together"
    return (
        f"Trained under differential privacy; the plan allows each site ε = {privacy.epsilon:g} at "
        f"δ = {privacy.delta:g} for {unit}. What was spent is in the sites' certificates."
    )


def layout_of(module: TaskModel) -> Layout:
    """The layout that a model's trained parameters have."""
    shapes = {name: tuple(p.shape) for name, p in module.trained.items()}
    head = [ArrayEntry(name, s, "head") for name, s in shapes.items() if name.startswith("head.")]
    adapter = [ArrayEntry(n, s, "adapter") for n, s in shapes.items() if not n.startswith("head.")]
    return Layout((*adapter, *head))


def read_adapter(model: LoadedModel) -> Vector:
    """The live trained parameters as a new flat vector, float32 [layout.size]."""
    return model.layout.pack(model.module.trained)


def write_adapter(model: LoadedModel, flat: NDArray[Any]) -> None:
    """Copy a flat vector into the live parameters, in place. Raises `AdapterMismatch`."""
    own = np.array(flat)  # torch wants writable memory; received vectors are read-only
    views = model.layout.unpack(own)
    with torch.no_grad():
        for name, parameter in model.module.trained.items():
            parameter.copy_(torch.from_numpy(views[name]))


def save_adapter(model: LoadedModel, flat: NDArray[Any], folder: Path, *, plan: Plan) -> None:
    """Write an adapter in PEFT's format, with its head and a card; the model is not changed.

    Parameters
    ----------
    model : LoadedModel
        Gives the names, the frozen matrices and the centre.
    flat : float32 array [layout.size]
        The adapter's values.
    folder : Path
        Made if need be; files of the same names are replaced, each in one step.
    plan : Plan
        Named in the card.

    Raises
    ------
    AdapterMismatch
        `flat` does not fit the model.
    """
    arrays = {name: np.array(view) for name, view in model.layout.unpack(flat).items()}
    trained_head = {name: arrays.pop(name) for name in list(arrays) if name.startswith("head.")}
    matrices = {name: arrays.get(name, frozen) for name, frozen in _live_matrices(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    if (config := _peft_config(model)) is not None:
        _replace(folder / MATRICES, safetensors.numpy.save(matrices, metadata={"format": "pt"}))
    if trained_head:
        head = trained_head | _fixed(model.module)
        _replace(folder / HEAD, safetensors.numpy.save(head, metadata={"format": "pt"}))
    identity = {"adapter_sha256": arrays_sha256({**matrices, **trained_head})}
    _replace(folder / SETTINGS, _json(settings(plan, tokens=_control_tokens(model)) | identity))
    _replace(folder / PLAN, plan.canonical().encode())
    card = readme(plan, model.description, auto=auto_of(model).__name__)
    _replace(folder / "README.md", card.encode())
    if config is not None:
        _replace(folder / CONFIG, _json(config))


def load_adapter(model: LoadedModel, folder: Path) -> Vector:
    """Read a folder that `save_adapter` wrote into a flat vector; the model is not changed.

    Raises
    ------
    AdapterMismatch
        A file is missing or damaged, or the adapter was made for another base model, rank, scale,
        task, pooling, centre or list of labels.
    """
    arrays: dict[str, NDArray[Any]] = {}
    if (expected := _peft_config(model)) is not None:
        own = {key: expected[key] for key in ("r", "lora_alpha", "use_rslora")}
        _require_equal(_read_json(folder / CONFIG), own)
        arrays |= _read_arrays(folder / MATRICES)
    _require_equal(_read_json(folder / SETTINGS), meaning(model.plan))
    if model.module.head is not None:
        arrays |= _read_arrays(folder / HEAD)
        for name, fixed in _fixed(model.module).items():
            _require_close(name, arrays.pop(name, None), fixed)
    trained = {entry.name for entry in model.layout.entries}
    for name, frozen in _live_matrices(model).items():
        if name not in trained:
            _require_close(name, arrays.pop(name, None), frozen)
    return model.layout.pack(arrays)


def folder_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """What is trained of an adapter's folder, by name: matrices and head; nothing that stands between.

    Raises
    ------
    AdapterMismatch
        A file is missing or damaged, or another method than LoRA made it.
    """
    found = dict[str, NDArray[Any]]()
    if (folder / CONFIG).exists() or not (folder / HEAD).exists():  # else a head is all
        _require_equal(_read_json(folder / CONFIG), {"peft_type": "LORA", "use_dora": False})
        found |= _read_arrays(folder / MATRICES)
    if (folder / HEAD).is_file():
        head = _read_arrays(folder / HEAD)
        found |= {name: array for name, array in head.items() if name.startswith("head.")}
    return found


def read_plan(folder: Path) -> Plan:
    """The plan that an adapter's folder was made with.

    Raises
    ------
    AdapterMismatch
        It is no adapter's folder, one of an earlier version, or the plan there is another one.
    """
    wanted = _read_json(folder / SETTINGS).get("plan_sha256")
    try:
        plan = Plan.from_canonical((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError, PlanInvalid) as exc:
        raise AdapterMismatch(
            f"{folder / PLAN} is missing or not readable",
            remedy="Give the run's directory instead, or the plan that it was trained with.",
        ) from exc
    if plan.sha256 != wanted:
        raise AdapterMismatch(f"{folder / PLAN} is not the plan that {SETTINGS} names")
    return plan


def _live_matrices(model: LoadedModel) -> dict[str, Vector]:
    """All LoRA matrices of the model, trained or frozen, by their saved names."""
    return {
        saved_name(name): parameter.detach().cpu().numpy()
        for name, parameter in model.module.peft.named_parameters()
        if ".lora_" in name
    }


def _fixed(module: TaskModel) -> dict[str, Vector]:
    """What stands between the model and its head and is not trained, by its name in the head's file."""
    parts = {"centre": module.centre}
    if module.cosines is not None:
        parts |= {"frequencies": module.cosines.frequencies, "phases": module.cosines.phases}
    return {name: part.cpu().numpy() for name, part in parts.items()}


def _control_tokens(model: LoadedModel) -> dict[str, Any]:
    """What a user of an adapter of responses or pairs needs to build the ids that it was trained on."""
    tokenizer = model.tokenizer
    if len(model.plan.task.reads) > 1:
        typed = model.module.tells_types and "token_type_ids" in tokenizer.model_input_names
        return {"pair_end": pair_end(tokenizer), "token_types": typed}
    if model.module.head is not None:
        return {}
    chat = model.plan.model.chat
    ends = end_ids(tokenizer, model.module.backbone)
    found = {"lead_ids": leading_ids(tokenizer), "pad_id": padding_id(tokenizer)}
    if chat is None:
        return found | {"end_ids": ends}
    shown = ChatFormat(tokenizer, chat)
    before, behind = shown.opening()
    ends = list(dict.fromkeys([*shown.stops(), *ends]))
    return found | {"lead_ids": before, "tail_ids": behind, "end_ids": ends}


def _peft_config(model: LoadedModel) -> dict[str, Any] | None:
    """PEFT's configuration as it saves it, with sets in a fixed order; None where a head is all."""
    if model.plan.lora.target_modules == "none":
        return None
    config: dict[str, Any] = model.module.peft.peft_config["default"].to_dict()
    config["inference_mode"] = True
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of it."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise AdapterMismatch(f"{path} is missing or not readable") from exc
    if not isinstance(content, dict):
        raise AdapterMismatch(f"{path} is not a table of settings")
    return content


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return dict(safetensors.numpy.load_file(path))
    except (OSError, safetensors.SafetensorError) as exc:
        raise AdapterMismatch(f"{path} is missing or not readable") from exc


def _require_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if found.get(key) != value:
            raise AdapterMismatch(f"{key} is {found.get(key)!r}, the plan's model has {value!r}")


def _require_close(name: str, found: NDArray[Any] | None, own: NDArray[Any]) -> None:
    """What is not trained must be the model's own, up to the rounding of another machine."""
    if found is None or found.shape != own.shape or not np.allclose(found, own, atol=1e-3):
        raise AdapterMismatch(f"{name} is not the one of the plan's model")
