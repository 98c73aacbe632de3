"""What a site answers: one frozen model a kind of reply, to and from Flower's records.

A reply has a record for each array, named as the model's field, and the record ``released`` with all
scalars. At the site only the gate writes one (`records_of`), with the fields that a model names; the
coordinator reads it back and believes nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from silotune.errors import SilotuneError, UpdateRejected
from silotune.models.layout import Vector
from silotune.privacy.errors import MessageMalformed
from silotune.privacy.secagg.messages import unpack_named
from silotune.protocol.requests import FLAT

Scalar = str | int | float | bool | bytes
_F = TypeVar("_F")

RELEASED = "released"
"""The record of all scalars. Every array has a record of its own, named like its field."""

_DTYPES = frozenset({"float32", "bfloat16", "float16"})  # a site may say nothing else


def records_of(arrays: Mapping[str, NDArray[Any]], scalars: Mapping[str, Scalar]) -> RecordDict:
    """Flower's records: one `ArrayRecord` an array, and ``released`` for the scalars.

    ``released`` is a `MetricRecord` if all scalars are numbers, otherwise a `ConfigRecord`.
    """
    records = RecordDict(
        {name: ArrayRecord({FLAT: Array(arrays[name])}) for name in sorted(arrays)}
    )
    ordered = {name: scalars[name] for name in sorted(scalars)}
    numbers = {
        name: value
        for name, value in ordered.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    plain = len(numbers) == len(ordered)
    records[RELEASED] = MetricRecord({**numbers}) if plain else ConfigRecord({**ordered})
    return records


class SiteReply:
    """Base of the replies."""

    @classmethod
    def fields(cls, **values: _F) -> dict[str, _F]:
        """What the gate is to let out, under the names that this reply has.

        Raises
        ------
        TypeError
            It has no field of such a name, or one that must be there is not.
        """
        known = {each.name: each.default is MISSING for each in fields(cls)}  # type: ignore[arg-type]
        wrong = (
            values.keys() - known.keys() | {n for n, due in known.items() if due} - values.keys()
        )
        if wrong:
            raise TypeError(f"{cls.__name__}: {', '.join(sorted(wrong))}")
        return values

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """The reply of a site. Raises `MessageMalformed`, or `UpdateRejected` of an update."""
        return cls(**cls._values(content))

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class JoinReply(SiteReply):
    """A site's terms: all of it declared in public.

    Attributes
    ----------
    site : str
        Its name.
    declared_units : int
        Rounded number of its privacy units.
    layout : str
        JSON of the adapter's layout that it derived from plan and model.
    dtype : str or None
        Of its base model.
    rate, sigma : float or None
        Sampling rate and noise multiplier of its steps.
    rank : int or None
        Of its adapter; None for the plan's.
    """

    site: str
    declared_units: int
    layout: str
    dtype: str | None = None
    rate: float | None = None
    sigma: float | None = None
    rank: int | None = None

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        found = _released(content)
        dtype, rank = found.get("dtype"), found.get("rank")
        units = _of(found, "declared_units", int)
        if units < 1:
            raise MessageMalformed("a site declares no units")
        return {
            "site": _of(found, "site", str),
            "declared_units": units,
            "layout": _of(found, "layout", str),
            "dtype": dtype if isinstance(dtype, str) and dtype in _DTYPES else None,
            "rate": _number(found, "rate"),
            "sigma": _number(found, "sigma"),
            "rank": rank
            if isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
            else None,
        }


@dataclass(frozen=True, kw_only=True)
class TrainReply(SiteReply):
    """An update: one flat float32 vector."""

    update: Vector

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        record = content.array_records.get("update")
        if record is None or list(record) != [FLAT]:
            raise UpdateRejected("the reply has no single array named 'flat'")
        if record[FLAT].dtype != "float32":
            raise UpdateRejected(f"the update is {record[FLAT].dtype}, not float32")
        flat = _array(content, "update", UpdateRejected)
        if flat.ndim != 1:
            raise UpdateRejected(f"the update has {flat.ndim} dimensions, not one")
        if flat.dtype != np.float32:
            raise UpdateRejected(f"the update is {flat.dtype}, not float32")
        return {"update": flat}


@dataclass(frozen=True, kw_only=True)
class EvaluateReply(SiteReply):
    """Counts of the shared adapter, and of the site's own where it keeps parts."""

    counts: NDArray[Any] | None = None
    personal: NDArray[Any] | None = None

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        there = content.array_records.keys() & {"counts", "personal"}
        return {name: _array(content, name, MessageMalformed) for name in there}


@dataclass(frozen=True, kw_only=True)
class KeysReply(SiteReply):
    """Signed public keys of a site for a round; None where a reply brings none along."""

    keys: bytes | None = None

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        return {"keys": _maybe_bytes(content, "keys")}

    def require_keys(self) -> bytes:
        """The keys. Raises `MessageMalformed` if there are none."""
        return _there(self.keys, "keys")


@dataclass(frozen=True, kw_only=True)
class MaskedReply(KeysReply):
    """A masked update, for which request it is, and keys for the next round."""

    update: NDArray[Any]
    request: bytes

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        return {
            "update": _array(content, "update", MessageMalformed),
            "request": _of(_released(content), "request", bytes),
            "keys": _maybe_bytes(content, "keys"),
        }


@dataclass(frozen=True, kw_only=True)
class ShareReply(SiteReply):
    """Secrets of a round, sealed for each member; None where a reply brings none along."""

    shares: Mapping[str, bytes] | None = None

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        return {"shares": _maybe_named(content, "shares")}

    def require_shares(self) -> Mapping[str, bytes]:
        """The secrets. Raises `MessageMalformed` if there are none."""
        return _there(self.shares, "shares")


@dataclass(frozen=True, kw_only=True)
class CheckReply(SiteReply):
    """A signature of the survivors."""

    signature: bytes

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        return {"signature": _of(_released(content), "signature", bytes)}


@dataclass(frozen=True, kw_only=True)
class OpenReply(ShareReply):
    """What takes the masks off the sum, and the next round's secrets."""

    opened: Mapping[str, bytes]

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        opened = unpack_named(_of(_released(content), "opened", bytes))
        return {"opened": opened, "shares": _maybe_named(content, "shares")}


def error_code(reply: Message) -> str | None:
    """The code of a reply that is an error; None of any other."""
    return str(reply.error.reason) if reply.has_error() else None


def _released(content: RecordDict) -> Mapping[str, object]:
    record = content.get(RELEASED)
    return record if isinstance(record, ConfigRecord | MetricRecord) else {}


def _of(found: Mapping[str, object], key: str, kind: type[_F]) -> _F:
    value = found.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise MessageMalformed(f"{key!r} is missing in the reply, or of another type")
    return value


def _there(value: _F | None, key: str) -> _F:
    if value is None:
        raise MessageMalformed(f"{key!r} is missing in the reply")
    return value


def _number(found: Mapping[str, object], key: str) -> float | None:
    value = found.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise MessageMalformed(f"{key!r} is no number")
    return float(value)


def _maybe_bytes(content: RecordDict, key: str) -> bytes | None:
    found = _released(content)
    return _of(found, key, bytes) if key in found else None


def _maybe_named(content: RecordDict, key: str) -> Mapping[str, bytes] | None:
    found = _maybe_bytes(content, key)
    return None if found is None else unpack_named(found)


def _array(content: RecordDict, name: str, error: type[SilotuneError]) -> NDArray[Any]:
    """An array as the site sent it."""
    try:
        return content.array_records[name][FLAT].numpy()
    except Exception as exc:  # of bytes that are no array NumPy raises what its parser happens to
        raise error(f"the reply has no readable array {name!r}") from exc
