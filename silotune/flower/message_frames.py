"""How a message crosses the wire between a site and the coordinator: whole, in one request.

Flower's own protocol takes a message apart into objects, and asks for each by its hash: some eleven
requests for an instruction and its answer. Here a message is a *head*, Flower's protobuf of all that is
small (metadata, envelope, or an error), and *pieces*, the sealed bytes. A frame is the head and as many
pieces as have 4 MB together, as they are, behind a few numbers; almost every message is one frame. Each
further frame of a longer one is a request of its own, so that no request is large.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from flwr.app import Message, RecordDict
from flwr.app.message.message import make_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from google.protobuf.message import DecodeError

from silotune.protocol.envelope import MOST_PIECE, add_pieces, take_pieces

MOST_HEAD = 1 << 16
"""Bytes of a head, at most."""

MOST_PIECES = 256
"""Pieces of a message, at most: 1 GB."""

MOST_FRAME = MOST_PIECE + MOST_HEAD + 64
"""Bytes of a frame, at most."""

_NUMBERS = struct.Struct("!4sIII")  # what it is, bytes of the head, which piece it has, of how many
_MAGIC = b"STf1"


class Parts(NamedTuple):
    """A message: what is small of it, and the rest in pieces."""

    head: bytes
    pieces: tuple[bytes, ...]


class MessageFrame(NamedTuple):
    """A head with one run of its message's pieces; a message without any has one frame too."""

    head: bytes
    number: int
    of: int
    piece: memoryview


def apart(message: Message) -> Parts:
    """A message as head and pieces; no byte of the pieces is copied."""
    if not message.has_content():
        return Parts(message_to_proto(message).SerializeToString(), ())
    rest, pieces = take_pieces(message.content)
    return Parts(message_to_proto(make_message(message.metadata, rest)).SerializeToString(), pieces)


def together(parts: Parts) -> Message:
    """Undo `apart`. Raises `ValueError` if the head is none."""
    try:
        message = message_from_proto(MessageProto.FromString(parts.head))
    except Exception as exc:  # Flower raises whatever it meets; all of it means that this is none
        raise ValueError("the head is no message") from exc
    if message.has_content():
        add_pieces(message.content, parts.pieces)
    return message


def outline_of(head: bytes) -> Message:
    """A message's address alone. Raises `ValueError` if the head is none."""
    return make_message(together(Parts(head, ())).metadata, content=RecordDict())


def answered_by(head: bytes) -> str:
    """Id of the instruction that a reply claims to answer. Raises `ValueError`."""
    try:
        return str(MessageProto.FromString(head).metadata.reply_to_message_id)
    except DecodeError as exc:
        raise ValueError("the head is no message") from exc


def prefix(head: bytes, *, number: int, of: int) -> bytes:
    """What goes before a piece to make a frame of it."""
    return _NUMBERS.pack(_MAGIC, len(head), number, of) + head


def runs(pieces: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    """Pieces as they share frames: a run has at most `MOST_PIECE` bytes, any two in a row have more."""
    found, room = list[tuple[bytes, ...]](), -1
    for piece in pieces:
        if len(piece) > room:
            found.append(())
            room = MOST_PIECE
        found[-1] += (piece,)
        room -= len(piece)
    return found


def frames(parts: Parts) -> list[tuple[bytes, ...]]:
    """All frames of a message, each as its prefix and its pieces: no byte of those is copied."""
    found = runs(parts.pieces)
    of = len(found)
    return [(prefix(parts.head, number=n, of=of), *run) for n, run in enumerate(found or [()])]


def read_frame(body: bytes) -> MessageFrame:
    """Read a frame. Raises `ValueError` if it is none."""
    if len(body) < _NUMBERS.size:
        raise ValueError("the frame is cut off")
    magic, length, number, of = _NUMBERS.unpack_from(body)
    if magic != _MAGIC:
        raise ValueError("this is no frame of the protocol, or of another version of it")
    start = _NUMBERS.size + length
    if length > MOST_HEAD or start > len(body) or len(body) - start > MOST_PIECE:
        raise ValueError("a part of the frame is too large")
    if of > MOST_PIECES or not (number < of or (number, of) == (0, 0)):
        raise ValueError("the frame has too many pieces, or one that is none of them")
    return MessageFrame(body[_NUMBERS.size : start], number, of, memoryview(body)[start:])
