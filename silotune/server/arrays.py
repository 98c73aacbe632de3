"""Arrays and a JSON-able state as one safetensors file, in memory: equal content, equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from silotune.server.errors import StoreUnusable

_STATE = "silotune"

Arrays = dict[str, NDArray[Any]]


def packed(arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> bytes:
    """One file of arrays, and of a state under the file's metadata."""
    # safetensors writes a strided view's base buffer; order="C" copies only what isn't contiguous.
    content = {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}
    text = json.dumps(state, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return bytes(save(content, metadata={_STATE: text}))


def unpacked(content: bytes) -> tuple[Arrays, dict[str, Any]]:
    """Read what `packed` wrote. Raises `StoreUnusable`."""
    try:
        arrays = dict(load(content))  # checks the header and every offset
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return arrays, json.loads(header.get("__metadata__", {}).get(_STATE, "{}"))
    except (SafetensorError, ValueError, AttributeError) as exc:
        raise StoreUnusable("a stored adapter or checkpoint is damaged") from exc
