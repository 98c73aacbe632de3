"""The envelope: every payload signed by who sends it, for one receiver, run, round and kind.

Flower authenticates connections, not content. A sealed content is the sender's records as bytes, and a
record with the address in clear and an Ed25519 signature (RFC 8032) over address and bytes. Nothing of
the bytes is read before the signature fits. The address fixes the place in the protocol, and a reply
names the very request it answers, so no message can be replayed, redirected or exchanged for another.
Sealing is deterministic: the same content at the same place gives the same bytes again.

The bytes are not in the record with the address, so that a record that every site is sent alike is
packed once (`Packing`) and stored once, also beside one that is the site's own. `take_pieces` and
`add_pieces` part a sealed content into what is small and what may be large, so that the large is never
copied into another message to be sent. Where the bytes are cut into pieces is not sealed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from google.protobuf.message import DecodeError

from silotune.plan.document import canonical_json
from silotune.trust.errors import EnvelopeInvalid
from silotune.trust.signed import Signing, fits

ENVELOPE = "envelope"
"""Name of the record with the address and the signature; ``bytes.0`` and so on hold the content."""

COORDINATOR = "coordinator"
"""The coordinator's name as sender and receiver; no site may have it."""

REFUSAL = "refusal"
"""Name of the one record of a reply that is an error: it holds the code, and nothing else."""

_ENVELOPE = Signing("silotune envelope v2", "message", EnvelopeInvalid)
MOST_PIECE = 4 << 20
"""Bytes of one piece of a sealed content, at most."""

_BYTES = "bytes"
_MOST_TEXT = 256


@dataclass(frozen=True, kw_only=True)
class MessagePlace:
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

    def reply(self, *, to: str) -> MessagePlace:
        """The address of the answer to a message at this address, whose seal has the id `to`."""
        return replace(self, sender=self.receiver, receiver=self.sender, in_reply_to=to)


@dataclass(frozen=True)
class _PackedRecord:
    """A record as bytes, and the hash of all bytes up to its end."""

    name: str
    record: Any
    pieces: tuple[bytes, ...]
    hashed: hashlib._Hash

    @classmethod
    def make(cls, name: str, record: Any, *, after: hashlib._Hash) -> _PackedRecord:
        """Pack a record that comes behind what `after` is the hash of."""
        # A copy, which nobody else changes.
        own = type(record)({key: record[key] for key in sorted(record)})
        packed = recorddict_to_proto(RecordDict({name: own})).SerializeToString(deterministic=True)
        hashed = after.copy()
        hashed.update(packed)
        starts = range(0, len(packed), MOST_PIECE)
        pieces = tuple(packed[start : start + MOST_PIECE] for start in starts)
        return cls(name, own, pieces, hashed)


class Packing:
    """Contents as bytes, record by record: those that equal the last content's are not packed again.

    A round asks every site the same, or the same with a few bytes of the site's own behind it; for 2 MB
    and a hundred sites that is most of the work. In protobuf the records one after the other are the
    packed content; in what order they were put together is not sealed.
    """

    def __init__(self) -> None:
        self._records: list[_PackedRecord] = []

    def of(self, content: RecordDict) -> tuple[bytes, tuple[bytes, ...]]:
        """SHA-256 of the packed content, and the content in pieces."""
        hashed = hashlib.sha256()
        for place, name in enumerate(sorted(content)):
            known = self._records[place] if place < len(self._records) else None
            if known is None or known.name != name or known.record != content[name]:
                del self._records[place:]
                known = _PackedRecord.make(name, content[name], after=hashed)
                self._records.append(known)
            hashed = known.hashed
        del self._records[len(content) :]
        pieces = tuple(piece for record in self._records for piece in record.pieces)
        return hashed.digest(), pieces or (b"",)


def seal(
    content: RecordDict,
    *,
    address: MessagePlace,
    key: Ed25519PrivateKey,
    packing: Packing | None = None,
) -> RecordDict:
    """The content as bytes, in pieces of at most 4 MB, and its envelope.

    Parameters
    ----------
    content : RecordDict
        What to seal.
    address : MessagePlace
        Where it belongs.
    key : Ed25519PrivateKey
        The sender's.
    packing : Packing, optional
        Shared by the seals of one exchange.

    Raises
    ------
    EnvelopeInvalid
        The content holds an envelope already.
    """
    if ENVELOPE in content:
        raise EnvelopeInvalid("the content is sealed already")
    digest, pieces = (packing or Packing()).of(content)
    signature = key.sign(_covered(address, digest))
    sealed = RecordDict({ENVELOPE: ConfigRecord({**asdict(address), "signature": signature})})
    return add_pieces(sealed, pieces)


def take_pieces(content: RecordDict) -> tuple[RecordDict, tuple[bytes, ...]]:
    """A content without its pieces, and the pieces."""
    pieces = list[bytes]()
    while (record := content.get(_piece(len(pieces)))) is not None:
        piece = record.get(_BYTES) if isinstance(record, ConfigRecord) else None
        if not isinstance(piece, bytes) or len(record) != 1:
            break
        pieces.append(piece)
    taken = {_piece(number) for number in range(len(pieces))}
    rest = RecordDict({name: record for name, record in content.items() if name not in taken})
    return rest, tuple(pieces)


def add_pieces(content: RecordDict, pieces: Iterable[bytes]) -> RecordDict:
    """Undo `take_pieces`, in place."""
    for number, piece in enumerate(pieces):
        content[_piece(number)] = ConfigRecord({_BYTES: piece})
    return content


def address_of(content: RecordDict) -> MessagePlace:
    """What an envelope claims, not verified. Raises `EnvelopeInvalid`."""
    return _parse(content)[0]


def seal_id(content: RecordDict) -> str:
    """Which message exactly: SHA-256 of its signature, in hex. Raises `EnvelopeInvalid`."""
    return hashlib.sha256(_parse(content)[1]).hexdigest()


def unseal(content: RecordDict, *, address: MessagePlace, key: Ed25519PublicKey) -> RecordDict:
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
    packed = _packed(content)
    if not fits(signature, _covered(claimed, hashlib.sha256(packed).digest()), key):
        raise EnvelopeInvalid(f"the signature of {claimed.sender!r} does not fit")
    try:
        return recorddict_from_proto(RecordDictProto.FromString(packed))
    except (DecodeError, ValueError, TypeError) as exc:
        raise EnvelopeInvalid("what is signed are no records") from exc


def refusal(code: str) -> RecordDict:
    """The content of a reply that is an error: a stable code is all that crosses the wire."""
    return RecordDict({REFUSAL: ConfigRecord({"code": code})})


def refusal_code(content: RecordDict) -> str | None:
    """The code of a refusal; None for any other content."""
    record = content.config_records.get(REFUSAL)
    return None if record is None else str(record.get("code", ""))[:_MOST_TEXT]


def _piece(number: int) -> str:
    return f"{_BYTES}.{number}"


def _packed(content: RecordDict) -> bytes:
    """The signed bytes, if there is nothing else beside the envelope."""
    names = [_piece(number) for number in range(len(content) - 1)]
    pieces = [content.config_records.get(name, ConfigRecord()).get(_BYTES) for name in names]
    if not pieces or not all(isinstance(piece, bytes) for piece in pieces):
        raise EnvelopeInvalid("the content is not in pieces of bytes")
    if len(pieces) == 1 and isinstance(pieces[0], bytes):
        return pieces[0]
    return b"".join(piece for piece in pieces if isinstance(piece, bytes))


def _covered(address: MessagePlace, digest: bytes) -> bytes:
    place = canonical_json(asdict(address)).encode()
    return _ENVELOPE.covered(place + b"\0" + digest)


def _parse(content: RecordDict) -> tuple[MessagePlace, bytes]:
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
    return MessagePlace(round=number, **{name: str(found[name]) for name in texts}), signature
