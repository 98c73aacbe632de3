"""A reply as plain values, as bytes on the disk, and as Flower records.

Both forms come from the same values by rules without choice: a reply read back from its bytes gives
records of the same content, to the last bit.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

Scalar = str | int | float | bool | bytes

RELEASED = "released"
"""The record of all scalars. Every array has a record of its own, named like its field."""

FLAT = "flat"
"""The one array of an array's record."""

_SCALARS = "scalars"
_ARRAY = "array:"


@dataclass(frozen=True)
class Reply:
    """What a site says, as named arrays and named scalars."""

    arrays: dict[str, NDArray[Any]]
    scalars: dict[str, Scalar]

    def to_bytes(self) -> bytes:
        """A safetensors file: the arrays, and the scalars as a tensor of JSON text."""
        text = json.dumps(
            {name: _plain(value) for name, value in self.scalars.items()},
            sort_keys=True,
            allow_nan=False,
        )
        tensors = {_ARRAY + name: array for name, array in self.arrays.items()}
        tensors[_SCALARS] = np.frombuffer(text.encode(), dtype=np.uint8)
        return bytes(save_tensors(tensors))

    @classmethod
    def from_bytes(cls, payload: bytes) -> Reply:
        """Read what `to_bytes` wrote."""
        tensors = load_tensors(payload)
        scalars = json.loads(tensors.pop(_SCALARS).tobytes())
        return cls(
            arrays={name.removeprefix(_ARRAY): array for name, array in tensors.items()},
            scalars={name: _unplain(value) for name, value in scalars.items()},
        )

    def records(self) -> RecordDict:
        """Flower's records: one `ArrayRecord` an array, and ``released`` for the scalars.

        ``released`` is a `MetricRecord` if all scalars are numbers, otherwise a `ConfigRecord`.
        """
        records = RecordDict()
        for name in sorted(self.arrays):
            records[name] = ArrayRecord({FLAT: Array(self.arrays[name])})
        scalars = {name: self.scalars[name] for name in sorted(self.scalars)}
        numbers = {
            name: value
            for name, value in scalars.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if len(numbers) == len(scalars):
            records[RELEASED] = MetricRecord({**numbers})
        else:
            records[RELEASED] = ConfigRecord({**scalars})
        return records


def _plain(value: Scalar) -> object:
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _unplain(value: Any) -> Scalar:
    return base64.b64decode(value["bytes"]) if isinstance(value, dict) else value
