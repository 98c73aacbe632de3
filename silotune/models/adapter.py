"""Adapters as one flat vector, as live parameters, and as folders that PEFT alone can load.

On the wire an adapter, an update or a gradient sum is one little-endian float32 vector. `Layout` says
where each array lies in it: LoRA matrices in module order (A, then B), then the head. Names are those
of PEFT's saved files, so that saving and loading rename nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from silotune.errors import AdapterMismatch
from silotune.models import card
from silotune.models.lora import initial_matrix, saved_name
from silotune.plan import Plan

if TYPE_CHECKING:
    from silotune.models.base import LoadedModel, TaskModel

Group = Literal["head", "adapter"]
Part = Literal["A", "B", "head"]
Vector = NDArray[np.float32]

MATRICES, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
HEAD, SETTINGS = "head.safetensors", "silotune.json"

_FLOAT = np.dtype("<f4")


@dataclass(frozen=True)
class Entry:
    """One array of an adapter: its name in PEFT's files (or the head's), shape and group."""

    name: str
    shape: tuple[int, ...]
    group: Group

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def part(self) -> Part:
        """Which of LoRA's two matrices it is, or the head."""
        if self.group == "head":
            return "head"
        return "A" if ".lora_A." in self.name else "B"


@dataclass(frozen=True)
class Span:
    """Where one array of an adapter lies in the flat vector, and which part it is of."""

    part: Part
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Names, shapes and order of the arrays in the flat vector; adapter first, head last."""

    entries: tuple[Entry, ...]

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(entry.size for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the flat vector."""
        return self.size * _FLOAT.itemsize

    @cached_property
    def slices(self) -> dict[Group, slice]:
        """Where each group that the layout has lies in the flat vector."""
        found: dict[Group, slice] = {}
        start = 0
        for entry in self.entries:
            begin = found[entry.group].start if entry.group in found else start
            start += entry.size
            found[entry.group] = slice(begin, start)
        return found

    def spans(self, parts: Collection[Part]) -> tuple[Span, ...]:
        """Where the arrays of some parts lie, in the order of the layout."""
        found, start = [], 0
        for entry in self.entries:
            if entry.part in parts:
                found.append(Span(entry.part, start, start + entry.size))
            start += entry.size
        return tuple(found)

    def mask(self, group: Group) -> slice:
        """The slice of one group; empty, at the end, for a group the layout lacks."""
        return self.slices.get(group, slice(self.size, self.size))

    def pack(self, arrays: Mapping[str, NDArray[Any] | Tensor]) -> Vector:
        """One flat vector from arrays by name.

        Returns
        -------
        float32 array [size]

        Raises
        ------
        AdapterMismatch
            A name is missing or unknown, or a shape differs.
        """
        names = {entry.name for entry in self.entries}
        if names != set(arrays):
            missing, unknown = sorted(names - set(arrays)), sorted(set(arrays) - names)
            raise AdapterMismatch(
                f"{len(missing)} arrays are missing{_first(missing)}, "
                f"{len(unknown)} are unknown{_first(unknown)}"
            )
        flat = np.empty(self.size, dtype=_FLOAT)
        for entry, view in zip(self.entries, self.unpack(flat).values(), strict=True):
            array = arrays[entry.name]
            if tuple(array.shape) != entry.shape:
                raise AdapterMismatch(
                    f"{entry.name} has shape {list(array.shape)}, expected {list(entry.shape)}"
                )
            view[...] = (
                array.detach().to("cpu", torch.float32).numpy()
                if isinstance(array, Tensor)
                else array
            )
        return flat

    def unpack(self, flat: NDArray[Any]) -> dict[str, Vector]:
        """Views of a flat vector, by name, in the order of the layout.

        Raises
        ------
        AdapterMismatch
            Not a contiguous float32 vector of length `size`.
        """
        if flat.shape != (self.size,) or flat.dtype != _FLOAT or not flat.flags.c_contiguous:
            raise AdapterMismatch(
                f"the vector is {flat.dtype} of shape {list(flat.shape)}, "
                f"expected float32 of shape [{self.size}]"
            )
        views, start = {}, 0
        for entry in self.entries:
            views[entry.name] = flat[start : start + entry.size].reshape(entry.shape)
            start += entry.size
        return views

    def to_json(self) -> str:
        """Canonical text; equal layouts have equal texts."""
        entries = [asdict(entry) for entry in self.entries]
        return json.dumps(entries, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Read back what `to_json` wrote. Raises `AdapterMismatch`."""
        try:
            entries = tuple(_entry(raw) for raw in json.loads(text))
        except (ValueError, TypeError, KeyError) as exc:
            raise AdapterMismatch("the text is not a layout") from exc
        groups = [entry.group for entry in entries]
        if groups != sorted(groups) or len({e.name for e in entries}) != len(entries):
            raise AdapterMismatch("the layout's groups are mixed or a name is listed twice")
        return cls(entries)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over names, shapes, groups and their order."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def layout_of(module: TaskModel) -> Layout:
    """The layout that a model's trained parameters have."""
    return Layout(
        tuple(
            Entry(name, tuple(p.shape), "head" if name.startswith("head.") else "adapter")
            for name, p in module.trained.items()
        )
    )


def initial_adapter(layout: Layout, plan: Plan) -> Vector:
    """Where every site starts: LoRA as `initial_matrix` says, the head at zero.

    Needs no model, so the coordinator computes it from the layout that sites agree on.
    """
    return layout.pack(
        {entry.name: initial_matrix(entry.name, entry.shape, plan) for entry in layout.entries}
    )


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
    head = {name: arrays.pop(name) for name in list(arrays) if name.startswith("head.")}
    matrices = {name: arrays.get(name, frozen) for name, frozen in _live_matrices(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / MATRICES, safetensors.numpy.save(matrices, metadata={"format": "pt"}))
    if head:
        head["centre"] = model.module.centre.cpu().numpy()
        _replace(folder / HEAD, safetensors.numpy.save(head, metadata={"format": "pt"}))
    _replace(folder / SETTINGS, _json(card.settings(plan)))
    _replace(folder / "README.md", card.readme(plan, model.description).encode())
    _replace(folder / CONFIG, _json(_peft_config(model)))


def load_adapter(model: LoadedModel, folder: Path) -> Vector:
    """Read a folder that `save_adapter` wrote into a flat vector; the model is not changed.

    Raises
    ------
    AdapterMismatch
        A file is missing or damaged, or the adapter was made for another base model, rank, scale,
        task, pooling, centre or list of labels.
    """
    expected, config = _peft_config(model), _read_json(folder / CONFIG)
    _require_equal(config, {key: expected[key] for key in ("r", "lora_alpha", "use_rslora")})
    _require_equal(_read_json(folder / SETTINGS), card.meaning(model.plan))
    arrays = _read_arrays(folder / MATRICES)
    if model.module.head is not None:
        arrays |= _read_arrays(folder / HEAD)
        _require_close("centre", arrays.pop("centre", None), model.module.centre)
    trained = {entry.name for entry in model.layout.entries}
    for name, frozen in _live_matrices(model).items():
        if name not in trained:
            _require_close(name, arrays.pop(name, None), torch.from_numpy(frozen))
    return model.layout.pack(arrays)


def _live_matrices(model: LoadedModel) -> dict[str, Vector]:
    """All LoRA matrices of the model, trained or frozen, by their saved names."""
    return {
        saved_name(name): parameter.detach().cpu().numpy()
        for name, parameter in model.module.peft.named_parameters()
        if ".lora_" in name
    }


def _peft_config(model: LoadedModel) -> dict[str, Any]:
    """PEFT's configuration as it saves it, with sets in a fixed order."""
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


def _require_close(name: str, found: NDArray[Any] | None, expected: Tensor) -> None:
    """What is not trained must be the model's own, up to the rounding of another machine."""
    own = expected.cpu().numpy()
    if found is None or found.shape != own.shape or not np.allclose(found, own, atol=1e-3):
        raise AdapterMismatch(f"{name} is not the one of the plan's model")


def _entry(raw: Any) -> Entry:
    shape = tuple(raw["shape"])
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    if not isinstance(raw["name"], str) or raw["group"] not in {"adapter", "head"} or not whole:
        raise ValueError
    return Entry(raw["name"], shape, raw["group"])


def _first(names: list[str]) -> str:
    return f" (first {names[0]})" if names else ""
