"""Where each array of an adapter lies in the one flat vector on the wire, and where all of them start.

An adapter, an update or a gradient sum travels as one little-endian float32 vector: LoRA matrices in
module order (A, then B), then the head. Names are those of PEFT's saved files. Nothing here needs a
model, nor the libraries of one: the coordinator works from the layout that the sites agree on. `pairs`
gives the two matrices of each adapted layer as views of a flat vector.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from silotune.errors import AdapterMismatch
from silotune.plan.counted import counted_parts
from silotune.plan.document import canonical_json
from silotune.plan.plan import Plan

Group = Literal["head", "adapter"]
Part = Literal["A", "B", "head"]
Vector = NDArray[np.float32]

_FLOAT = np.dtype("<f4")
_ORDER: tuple[Group, ...] = ("adapter", "head")
_ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.default\.")


class Detachable(Protocol):
    """What is asked of a PyTorch tensor here."""

    @property
    def shape(self) -> Any:
        """Its shape."""

    def detach(self) -> Any:
        """Itself, outside any gradient."""


@dataclass(frozen=True)
class ArrayEntry:
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

    @property
    def size(self) -> int:
        """Number of values."""
        return self.stop - self.start


def laid_out(spans: Iterable[Span]) -> Iterator[tuple[Span, slice]]:
    """Some spans, each with its place in a vector that has them alone, one after the other."""
    start = 0
    for span in spans:
        yield span, slice(start, start + span.size)
        start += span.size


def gathered(flat: Vector, spans: Iterable[Span]) -> Vector:
    """Some spans of a flat vector, one after the other."""
    parts = [flat[span.start : span.stop] for span in spans]
    return np.concatenate(parts) if parts else flat[:0]


@dataclass(frozen=True)
class Layout:
    """Names, shapes and order of the arrays in the flat vector: the adapter, then the head."""

    entries: tuple[ArrayEntry, ...]

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(entry.size for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the flat vector."""
        return self.size * _FLOAT.itemsize

    def spans(self, parts: Collection[Part]) -> tuple[Span, ...]:
        """Where the arrays of some parts lie, in the order of the layout."""
        return tuple(span for span in self._spans if span.part in parts)

    @cached_property
    def _spans(self) -> tuple[Span, ...]:
        stops = itertools.accumulate((entry.size for entry in self.entries), initial=0)
        return tuple(
            Span(entry.part, start, stop)
            for entry, (start, stop) in zip(self.entries, itertools.pairwise(stops), strict=True)
        )

    def spread(self, spans: Iterable[Span], values: Vector) -> Vector:
        """A new vector that is zero but for some spans, which get the values one after the other."""
        made = np.zeros(self.size, dtype=_FLOAT)
        for span, place in laid_out(spans):
            made[span.start : span.stop] = values[place]
        return made

    def at_rank(self, rank: int) -> Layout:
        """The same layout with LoRA matrices of another rank."""
        return Layout(tuple(replace(e, shape=_ranked(e, rank)) for e in self.entries))

    def cut(self, flat: NDArray[Any], smaller: Layout) -> Vector:
        """A new vector of a layout of smaller rank: the leading rows of A and columns of B."""
        made = np.empty(smaller.size, dtype=_FLOAT)
        parts = zip(self.unpack(flat).values(), smaller.unpack(made).values(), strict=True)
        for whole, part in parts:
            part[...] = whole[tuple(slice(n) for n in part.shape)]
        return made

    def widen(self, flat: NDArray[Any], smaller: Layout) -> Vector:
        """The reverse of `cut`, with zeros where the smaller adapter has nothing."""
        made = np.zeros(self.size, dtype=_FLOAT)
        parts = zip(self.unpack(made).values(), smaller.unpack(flat).values(), strict=True)
        for whole, part in parts:
            whole[tuple(slice(n) for n in part.shape)] = part
        return made

    def pack(self, arrays: Mapping[str, NDArray[Any] | Detachable]) -> Vector:
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
                f"{len(missing)} arrays are missing{first_of(missing)}, "
                f"{len(unknown)} are unknown{first_of(unknown)}"
            )
        flat = np.empty(self.size, dtype=_FLOAT)
        for entry, view in zip(self.entries, self.unpack(flat).values(), strict=True):
            array = arrays[entry.name]
            if tuple(array.shape) != entry.shape:
                raise AdapterMismatch(
                    f"{entry.name} has shape {list(array.shape)}, expected {list(entry.shape)}"
                )
            view[...] = (
                array if isinstance(array, np.ndarray) else array.detach().float().cpu().numpy()
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
        return canonical_json(entries)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Read back what `to_json` wrote. Raises `AdapterMismatch`."""
        try:
            entries = tuple(_entry(raw) for raw in json.loads(text))
        except (ValueError, TypeError, KeyError) as exc:
            raise AdapterMismatch("the text is not a layout") from exc
        groups = [entry.group for entry in entries]
        names = {entry.name for entry in entries}
        if groups != sorted(groups, key=_ORDER.index) or len(names) != len(entries):
            raise AdapterMismatch("the layout's groups are mixed or a name is listed twice")
        return cls(entries)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over names, shapes, groups and their order."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def arrays_sha256(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Identity of an adapter: SHA-256, in hex, over names, shapes and values in the order of names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        whole = np.ascontiguousarray(array, dtype="<f4")
        digest.update(f"{name}\0{whole.shape}\0".encode() + whole.tobytes())
    return digest.hexdigest()


def statistics_layout(plan: Plan) -> Layout:
    """Where each part of a plan's statistics lies: they travel as an adapter's head does."""
    parts = counted_parts(plan)
    return Layout(tuple(ArrayEntry(part.name, (part.size,), "head") for part in parts))


def initial_adapter(layout: Layout, plan: Plan) -> Vector:
    """Where every site starts: LoRA as `initial_matrix` says, the head at zero.

    Needs no model, so the coordinator computes it from the layout that sites agree on.
    """
    return layout.pack(
        {entry.name: initial_matrix(entry.name, entry.shape, plan) for entry in layout.entries}
    )


def initial_matrix(name: str, shape: tuple[int, ...], plan: Plan) -> NDArray[np.float32]:
    """Where one adapter matrix starts: A uniform in ±1/sqrt(in), B zero.

    Every site must start from the same adapter without being sent one. The start is therefore a
    function of public things alone, the plan and the names of the matrices, computed by an
    extendable-output hash whose stream is the same on every machine and in every library version.
    The uniform numbers are the leading 24 bits of each 32-bit word of SHAKE-256 over the plan's seed
    (without one, over the plan's hash) and the matrix's name.

    Parameters
    ----------
    name : str
        As in PEFT's saved files, e.g. ``base_model.model.h.0.attn.c_attn.lora_A.weight``.
    shape : tuple of int
        ``[r, in]`` for A, ``[out, r]`` for B.

    Returns
    -------
    float32 array of the given shape
    """
    if ".lora_A." not in name:
        return np.zeros(shape, dtype=np.float32)
    seed = plan.plan.seed
    source = f"plan {plan.sha256}" if seed is None else f"seed {seed}"
    stream = hashlib.shake_256(f"silotune lora v1\0{source}\0{name}".encode())
    size = int(np.prod(shape))
    words = np.frombuffer(stream.digest(4 * size), dtype="<u4") >> 8
    unit = words.astype(np.float64) * 2.0**-23 - 1.0
    start: NDArray[np.float32] = (unit / np.sqrt(shape[1])).astype(np.float32).reshape(shape)
    return start


def _entry(raw: Any) -> ArrayEntry:
    shape = tuple(raw["shape"])
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    if not isinstance(raw["name"], str) or raw["group"] not in _ORDER or not whole:
        raise ValueError
    return ArrayEntry(raw["name"], shape, raw["group"])


def _ranked(entry: ArrayEntry, rank: int) -> tuple[int, ...]:
    if entry.part == "A":
        return (rank, *entry.shape[1:])
    return (*entry.shape[:-1], rank) if entry.part == "B" else entry.shape


def first_of(names: list[str]) -> str:
    """How a message goes on that counts some names."""
    return f" (first {names[0]})" if names else ""


Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """One adapted layer.

    Attributes
    ----------
    name : str
        Of A, as in the layout.
    A : float32 array [r, in]
    B : float32 array [out, r]
    """

    name: str
    A: Matrix
    B: Matrix


def pairs(layout: Layout, flat: NDArray[np.float32]) -> Iterator[Pair]:
    """The adapted layers in the order of the layout; their matrices are views of `flat`."""
    views = layout.unpack(flat)
    for name, A in views.items():
        if ".lora_A." in name:
            stem, leaf = name.split(".lora_A.")
            yield Pair(name, A, views[f"{stem}.lora_B.{leaf}"])


def saved_name(live: str) -> str:
    """Name of a live LoRA parameter in PEFT's own files: without the adapter's name."""
    return _ADAPTER_NAME.sub(r"\1.", live)
