"""The envelope: every payload signed by who sends it, for one receiver, run, round and kind.

Flower authenticates connections, not content. A sealed content is the sender's records and one
record more, with the address in clear and an Ed25519 signature (RFC 8032) over address and content.
The address fixes the place in the protocol, and a reply names the very request it answers, so no
message can be replayed, redirected or exchanged for another. Sealing is deterministic: the same
content at the same place gives the same bytes again.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from silotune.federation.errors import EnvelopeInvalid

ENVELOPE = "envelope"
"""Name of the record that a seal adds."""

COORDINATOR = "coordinator"
"""The coordinator's name as sender and receiver; no site may have it."""

REFUSAL = "refusal"
"""Name of the one record of a reply that is an error: it holds the code, and nothing else."""

_CONTEXT = b"silotune envelope v1\0"
_MOST_TEXT = 256


@dataclass(frozen=True, kw_only=True)
class Address:
    """A message's place in the protocol.

    Attributes
    ----------
    federation, run : str
        Names.
    round : int
        Round number; 0 before the first.
    kind : str
        Flower's message type, such as ``train`` or ``query.join``.
    sender, receiver : str
        Names of sites, or `COORDINATOR`.
    in_reply_to : str
        `seal_id` of the request that this answers; empty in a request.
    """

    federation: str
    run: str
    round: int
    kind: str
    sender: str
    receiver: str
    in_reply_to: str = ""

    def reply(self, *, to: str) -> Address:
        """The address of the answer to a message at this address, whose seal has the id `to`."""
        return replace(self, sender=self.receiver, receiver=self.sender, in_reply_to=to)


def seal(content: RecordDict, *, address: Address, key: Ed25519PrivateKey) -> RecordDict:
    """The content and its envelope; arrays are shared, not copied.

    Raises
    ------
    EnvelopeInvalid
        The content holds an envelope already.
    """
    if ENVELOPE in content:
        raise EnvelopeInvalid("the content is sealed already")
    signature = key.sign(_signed(address, content))
    sealed = RecordDict(dict(content))
    sealed[ENVELOPE] = ConfigRecord({**asdict(address), "signature": signature})
    return sealed


def address_of(content: RecordDict) -> Address:
    """What an envelope claims, not verified. Raises `EnvelopeInvalid`."""
    return _parse(content)[0]


def seal_id(content: RecordDict) -> str:
    """Which message exactly: SHA-256 of its signature, in hex. Raises `EnvelopeInvalid`."""
    return hashlib.sha256(_parse(content)[1]).hexdigest()


def unseal(content: RecordDict, *, address: Address, key: Ed25519PublicKey) -> RecordDict:
    """The content without its envelope, if `key` signed it for exactly this address.

    Parameters
    ----------
    content : RecordDict
        As it came.
    address : Address
        What the receiver expects. One that does not know the run or round beforehand takes them from
        `address_of`, judges them, and then asks for exactly that.
    key : Ed25519PublicKey
        The sender's.

    Raises
    ------
    EnvelopeInvalid
        There is no envelope, it is for another place, or the signature is wrong.
    """
    claimed, signature = _parse(content)
    wrong = [name for name, value in asdict(address).items() if getattr(claimed, name) != value]
    if wrong:
        raise EnvelopeInvalid(f"the message is for another place: {', '.join(wrong)} differ")
    bare = RecordDict({name: record for name, record in content.items() if name != ENVELOPE})
    try:
        key.verify(signature, _signed(claimed, bare))
    except InvalidSignature as exc:
        raise EnvelopeInvalid(f"the signature of {claimed.sender!r} does not fit") from exc
    return bare


def refusal(code: str) -> RecordDict:
    """The content of a reply that is an error: a stable code is all that crosses the wire."""
    return RecordDict({REFUSAL: ConfigRecord({"code": code})})


def refusal_code(content: RecordDict) -> str | None:
    """The code of a refusal; None for any other content."""
    record = content.config_records.get(REFUSAL)
    return None if record is None else str(record.get("code", ""))[:_MOST_TEXT]


def content_digest(content: RecordDict) -> bytes:
    """SHA-256 over names, types and values of all records, independent of their order.

    Every part is preceded by its kind and length, so that no two contents have the same encoding.
    """
    total = hashlib.sha256()
    for name in sorted(content):
        _feed(total, b"record", name.encode())
        record = content[name]
        if isinstance(record, ArrayRecord):
            for key in sorted(record):
                array = record[key]
                shape = json.dumps([int(n) for n in array.shape]).encode()
                _feed(total, b"array", key.encode(), array.dtype.encode(), shape)
                _feed(total, array.stype.encode(), array.data)
        elif isinstance(record, ConfigRecord | MetricRecord):
            _feed(total, b"config" if isinstance(record, ConfigRecord) else b"metric")
            _feed_values(total, record)
        else:
            raise EnvelopeInvalid(f"record {name!r} is of a kind that can't be signed")
    return total.digest()


def _feed_values(total: Any, values: Mapping[str, Any]) -> None:
    for key in sorted(values):
        value = values[key]
        _feed(total, b"value", key.encode())
        if isinstance(value, list):
            _feed(total, b"list", struct.pack(">Q", len(value)))
            for item in value:
                _feed(total, *_scalar(item))
        else:
            _feed(total, *_scalar(value))


def _scalar(value: object) -> tuple[bytes, bytes]:
    match value:
        case bool():
            return b"bool", bytes([value])
        case int():
            return b"int", str(value).encode()
        case float():
            return b"float", struct.pack(">d", value)
        case str():
            return b"str", value.encode()
        case bytes():
            return b"bytes", value
        case _:
            raise EnvelopeInvalid(f"a value of type {type(value).__name__} can't be signed")


def _feed(total: Any, *parts: bytes) -> None:
    for part in parts:
        total.update(struct.pack(">Q", len(part)))
        total.update(part)


def _signed(address: Address, content: RecordDict) -> bytes:
    text = json.dumps(asdict(address), sort_keys=True, separators=(",", ":"))
    return _CONTEXT + text.encode() + b"\0" + content_digest(content)


def _parse(content: RecordDict) -> tuple[Address, bytes]:
    record = content.config_records.get(ENVELOPE)
    if record is None:
        raise EnvelopeInvalid("the message is not signed")
    found = dict(record)
    signature = found.pop("signature", None)
    number = found.pop("round", None)
    texts = ("federation", "run", "kind", "sender", "receiver", "in_reply_to")
    good = (
        isinstance(signature, bytes)
        and isinstance(number, int)
        and not isinstance(number, bool)
        and set(found) == set(texts)
        and all(isinstance(v, str) and len(v) <= _MOST_TEXT for v in found.values())
    )
    if not good:
        raise EnvelopeInvalid("the envelope has missing, unknown or wrong fields")
    assert isinstance(signature, bytes) and isinstance(number, int)
    return Address(round=number, **{name: str(found[name]) for name in texts}), signature
