"""What the coordinator asks of a site: one frozen model a kind of message, to and from Flower's records.

A request is up to three records: ``config`` (the plan's text, the run, the round and the settings of the
round), ``arrays`` (the adapter, flat) and ``secure`` (byte strings of secure aggregation). Nowhere else
are they built or read. What is missing or of another type is refused before anything is done with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from silotune.errors import PlanInvalid
from silotune.events.tracing import TRACEPARENT
from silotune.models.layout import Vector
from silotune.plan.plan import Plan
from silotune.privacy.errors import MessageMalformed
from silotune.privacy.secagg.messages import pack_named, pack_names, unpack_named, unpack_names

FLAT = "flat"
"""The one array of a record of arrays."""

_CONFIG, _ARRAYS, _SECURE = "config", "arrays", "secure"
_SECURE_FORM = "form"  # of a field's metadata: how to write and read it as bytes

_Form = tuple[Callable[[Any], bytes], Callable[[bytes], Any]]
_BYTES: _Form = (bytes, bytes)
_NAMES: _Form = (pack_names, unpack_names)
_NAMED: _Form = (pack_named, unpack_named)


def _secure(form: _Form, **options: Any) -> Any:
    return field(metadata={_SECURE_FORM: form}, **options)


@lru_cache(maxsize=8)
def plan_of(text: str) -> Plan:
    """The plan of a message, parsed at its first message alone. Raises `PlanInvalid`."""
    return Plan.from_canonical(text)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every request says; `Request.read` reads that much of any.

    Attributes
    ----------
    kind : str
        Flower's message type.
    plan : str
        Canonical text of the plan.
    run : str
        The run's name.
    round : int
        From 1; 0 where a request is about no round.
    """

    kind: ClassVar[str] = ""
    plan: str
    run: str
    round: int = 0

    def config(self) -> ConfigRecord:
        """The record of settings."""
        found: dict[str, Any] = {"plan": self.plan, "run": self.run}
        return ConfigRecord({**found, "round": self.round} if self.round else found)

    def content(self) -> RecordDict:
        """All records."""
        return RecordDict({_CONFIG: self.config()})

    def message(self, node: int) -> Message:
        """For a node; Flower's group is the round."""
        group = str(self.round) if self.round else ""
        return Message(self.content(), dst_node_id=node, message_type=self.kind, group_id=group)

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """The request of a message.

        Raises
        ------
        PlanInvalid
            Plan, run, round or a setting is missing, or of another type.
        MessageMalformed
            A byte string of secure aggregation is.
        """
        return cls(**cls._values(content))

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        config: Mapping[str, object] = content.config_records.get(_CONFIG) or {}
        number = config.get("round", 0)
        if not isinstance(number, int) or isinstance(number, bool):
            raise PlanInvalid("the message has no round number")
        return {"plan": _text(config, "plan"), "run": _text(config, "run"), "round": number}


class JoinRequest(Request):
    """Check that the plan can be served, set its budget aside, and say on what terms."""

    kind = "query.join"


@dataclass(frozen=True, kw_only=True)
class _RoundRequest(Request):
    """A request about a round."""

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        found = super()._values(content)
        if found["round"] < 1:
            raise PlanInvalid("the message has no round number")
        return found


@dataclass(frozen=True, kw_only=True)
class _AdapterRequest(_RoundRequest):
    """A request with the global adapter.

    Attributes
    ----------
    arrays : ArrayRecord
        The adapter; one record for all receivers, so that it is encoded and hashed once.
    clip : float or None
        The clipping norm of the round, where it adapts.
    """

    arrays: ArrayRecord
    clip: float | None = None

    @property
    def adapter(self) -> Vector:
        """The flat adapter."""
        return np.asarray(self.arrays[FLAT].numpy(), dtype=np.float32)

    def config(self) -> ConfigRecord:
        config = super().config()
        if self.clip is not None:
            config["clip"] = self.clip
        return config

    def content(self) -> RecordDict:
        return adapter_content(self.arrays, self.config())

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        found = super()._values(content)
        clip = content.config_records[_CONFIG].get("clip")
        if clip is not None and not (isinstance(clip, float) and math.isfinite(clip) and clip > 0):
            raise PlanInvalid("the message's clipping norm is not a positive number")
        return {**found, "arrays": content.array_records[_ARRAYS], "clip": clip}


class TrainRequest(_AdapterRequest):
    """Train a round from this adapter, and send the update."""

    kind = "train"


class EvaluateRequest(_AdapterRequest):
    """Release metrics of this adapter."""

    kind = "evaluate"


@dataclass(frozen=True, kw_only=True)
class SecureRequest(_RoundRequest):
    """A phase of secure aggregation."""

    def content(self) -> RecordDict:
        """All records."""
        values = {
            each.name: each.metadata[_SECURE_FORM][0](getattr(self, each.name))
            for each in fields(self)
            if _SECURE_FORM in each.metadata and getattr(self, each.name) is not None
        }
        content = super().content()
        content[_SECURE] = ConfigRecord({**values})
        return content

    @classmethod
    def _values(cls, content: RecordDict) -> dict[str, Any]:
        found = super()._values(content)
        record: Mapping[str, object] = content.config_records.get(_SECURE) or {}
        for each in fields(cls):
            if _SECURE_FORM not in each.metadata:
                continue
            value = record.get(each.name)
            if isinstance(value, bytes):
                found[each.name] = each.metadata[_SECURE_FORM][1](value)
            elif each.name != "attempt":
                raise MessageMalformed(f"the message has no bytes {each.name!r}")
        return found


@dataclass(frozen=True, kw_only=True)
class KeysRequest(SecureRequest):
    """Public keys for a round; `attempt` tells one try from another, and says nothing to a site."""

    kind = "train.keys"
    attempt: bytes | None = _secure(_BYTES, default=None)


@dataclass(frozen=True, kw_only=True)
class ShareRequest(SecureRequest):
    """Share the round's secrets among this cohort."""

    kind = "train.share"
    cohort: bytes = _secure(_BYTES)


@dataclass(frozen=True, kw_only=True)
class MaskedRequest(SecureRequest, _AdapterRequest):
    """Train, and send the update masked: who is there, and what they sealed for this site."""

    kind = "train.masked"
    present: Sequence[str] = _secure(_NAMES)
    sealed: Mapping[str, bytes] = _secure(_NAMED)


@dataclass(frozen=True, kw_only=True)
class CheckRequest(SecureRequest):
    """Sign who survived."""

    kind = "train.check"
    survivors: Sequence[str] = _secure(_NAMES)


@dataclass(frozen=True, kw_only=True)
class OpenRequest(SecureRequest):
    """Open the masks of the survivors; share the next round's secrets if its cohort is given."""

    kind = "train.open"
    survivors: Sequence[str] = _secure(_NAMES)
    signatures: Mapping[str, bytes] = _secure(_NAMED)
    cohort: bytes = _secure(_BYTES, default=b"")


REQUESTS: Mapping[str, type[Request]] = {
    each.kind: each
    for each in (
        *(JoinRequest, TrainRequest, EvaluateRequest),
        *(KeysRequest, ShareRequest, MaskedRequest, CheckRequest, OpenRequest),
    )
}
"""Every type of message that a site answers; all else is refused unread."""


def as_arrays(flat: Vector) -> ArrayRecord:
    """A flat vector as the one array of a record."""
    return ArrayRecord({FLAT: Array(np.ascontiguousarray(flat, dtype="<f4"))})


def adapter_content(arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
    """The records of a request with an adapter."""
    return RecordDict({_ARRAYS: arrays, _CONFIG: config})


class Trace(NamedTuple):
    """What a message says of its place, believed for logs and spans alone."""

    run: str
    round: int
    parent: str | None


def trace_of(content: RecordDict) -> Trace:
    """Run, round and ``traceparent`` of any message, also of one without form."""
    config: Mapping[str, object] = content.config_records.get(_CONFIG) or {}
    run, number, parent = config.get("run"), config.get("round"), config.get(TRACEPARENT)
    return Trace(
        run if isinstance(run, str) else "",
        number if isinstance(number, int) else 0,
        parent if isinstance(parent, str) else None,
    )


def put_trace(message: Message, parent: str) -> None:
    """Name the span that a message belongs to."""
    # A record of its own: the grid may keep the one of an earlier exchange.
    settings = message.content.config_records[_CONFIG]
    message.content[_CONFIG] = ConfigRecord({**settings, TRACEPARENT: parent})


def _text(config: Mapping[str, object], key: str) -> str:
    value = config.get(key)
    if not isinstance(value, str):
        raise PlanInvalid(f"the message has no text {key!r}")
    return value
