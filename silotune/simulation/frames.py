"""Frames between the simulator and its workers: a JSON header and raw blobs, and nothing else.

``<u32 length of the header> <u32 length of all small blobs> <header, UTF-8 JSON> <small blobs> <large
blobs>``; the header's ``sizes`` lists the lengths of all blobs, in bytes and in their order. No frame
can carry code.
"""

from __future__ import annotations

import io
import json
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_LENGTHS = struct.Struct("<II")
_LARGE = 1 << 16  # bytes; large blobs are sent and received by themselves, without being copied
_PLAIN_KINDS = frozenset("biufc")

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Frame:
    """One frame.

    Parameters
    ----------
    kind : str
        What the frame is for.
    header : Mapping[str, Any]
        JSON values; ``kind`` and ``sizes`` are reserved.
    blobs : Sequence[bytes]
        Raw content.
    """

    kind: str
    header: Mapping[str, Any] = field(default_factory=dict)
    blobs: Sequence[bytes] = ()


def encode(frame: Frame) -> list[bytes]:
    """The frame's bytes, in pieces: head and small blobs, then each large blob."""
    sizes = [len(blob) for blob in frame.blobs]
    header = json.dumps({**frame.header, "kind": frame.kind, "sizes": sizes}).encode()
    small = b"".join(blob for blob in frame.blobs if len(blob) < _LARGE)
    large = [blob for blob in frame.blobs if len(blob) >= _LARGE]
    return [_LENGTHS.pack(len(header), len(small)) + header + small, *large]


def decode(read: Callable[[int], bytes]) -> Frame:
    """A frame from a function that gives so many of the next bytes."""
    header_length, small_length = _LENGTHS.unpack(read(_LENGTHS.size))
    start = read(header_length + small_length)
    header, position, blobs = json.loads(start[:header_length]), header_length, []
    kind, sizes = header.pop("kind"), header.pop("sizes")
    for size in sizes:
        if size < _LARGE:
            blobs.append(start[position : position + size])
            position += size
        else:
            blobs.append(read(size))
    return Frame(kind, header, blobs)


def through_bytes(frame: Frame) -> Frame:
    """The frame as the other side would see it."""
    return decode(io.BytesIO(b"".join(encode(frame))).read)


def send_frame(connection: socket.socket, frame: Frame) -> None:
    """Send a frame. Raises `OSError` when the other side is gone."""
    for piece in encode(frame):
        connection.sendall(piece)


def receive_frame(connection: socket.socket) -> Frame:
    """Receive a frame; blocks until it is complete. Raises `EOFError` at the end."""

    def read(size: int) -> bytes:
        # One system call where possible: a thread that reads in small pieces has to get the
        # interpreter's lock back after each of them, from a thread that computes.
        content = connection.recv(size, socket.MSG_WAITALL)
        while len(content) < size:
            more = connection.recv(size - len(content), socket.MSG_WAITALL)
            if not more:
                raise EOFError
            content += more
        return content

    return decode(read)


def pack_arrays(arrays: Arrays) -> tuple[list[list[Any]], list[bytes]]:
    """Arrays as JSON descriptions ``[name, dtype, shape]`` and their bytes in C order.

    Raises
    ------
    TypeError
        An array holds objects or text rather than numbers.
    """
    for name, array in arrays.items():
        if array.dtype.kind not in _PLAIN_KINDS:
            raise TypeError(f"array {name!r} has dtype {array.dtype}, which is not numeric")
    described = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    return described, [array.tobytes() for array in arrays.values()]


def unpack_arrays(
    described: Sequence[Sequence[Any]], blobs: Sequence[bytes]
) -> dict[str, np.ndarray]:
    """Arrays from what `pack_arrays` gave: writable, and each call gives its own copy."""
    return {
        name: np.frombuffer(blob, dtype=np.dtype(dtype)).reshape(shape).copy()
        for (name, dtype, shape), blob in zip(described, blobs, strict=True)
    }
