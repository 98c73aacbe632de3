"""Flower messages as content-addressed objects, through Flower's own serialisation.

A `Message` is a tree of objects (message, record dict, records, arrays, chunks of arrays); each
object's id is the SHA-256 of its deflated bytes, so equal content has equal ids and need travel to
a worker only once. Whoever makes a message, takes it apart or puts it together does it here; the
tests of this module are the contract with the admitted releases of Flower.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message.arraychunk import ArrayChunk
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES
from flwr.common.constant import SUPERLINK_NODE_ID as _SUPERLINK_NODE_ID
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore import telemetry
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    _get_computed_object_ids,
    get_object_id,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SUPERLINK_NODE_ID: Final[int] = _SUPERLINK_NODE_ID
APP_RAISED: Final[int] = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
NODE_UNAVAILABLE: Final[int] = ErrorCode.NODE_UNAVAILABLE
_CHUNK: Final = f"ArrayChunk{HEAD_VALUE_DIVIDER}{HEAD_VALUE_DIVIDER}".encode()


@dataclass(frozen=True)
class Packed:
    """A message as objects.

    Parameters
    ----------
    root : str
        The message's own object id, which is also its message id.
    objects : Mapping[str, InflatableObject]
        Every object of the tree by id, children before their parents.
    contents : Mapping[str, bytes]
        Bytes of those that were deflated for their ids.
    tree : ObjectTree
        The ids, as Flower announces them.
    """

    root: str
    objects: Mapping[str, InflatableObject]
    contents: Mapping[str, bytes]
    tree: ObjectTree

    def deflate(self, object_id: str) -> bytes:
        """The bytes of one object; their SHA-256 is `object_id`."""
        known = self.contents.get(object_id)
        return self.objects[object_id].deflate() if known is None else known


def identify(run_id: int) -> None:
    """Make this process the server of a run, so that `Message(...)` can be constructed."""
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def new_run(run_id: int) -> Run:
    """Flower's description of a run that has nothing but an id."""
    return Run.create_empty(run_id)


def stamp(message: Message, *, run_id: int) -> None:
    """Set the sender of an instruction; both fields are part of what its id is a hash of."""
    message.metadata.__dict__["_run_id"] = run_id
    message.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID


def pack(message: Message) -> Packed:
    """Compute every object id of a message, each hashed once, and set its message id.

    An array that is part of several messages keeps its id between calls (Flower tracks changes),
    so a broadcast is hashed once for all its receivers.
    """
    objects: dict[str, InflatableObject] = {}
    contents: dict[str, bytes] = {}
    for record in message.content.values() if message.has_content() else ():
        if isinstance(record, ArrayRecord):
            for array in record.values():
                contents |= _cut(array)

    def walk(node: InflatableObject) -> ObjectTree:
        # Looked at before its parts, which are no news any more once they have their ids.
        changed = node.is_dirty or "_object_id" not in node.__dict__
        if isinstance(node, Array):
            cut = dict(node.slice_array())
            objects.update(cut)
            below = [ObjectTree(object_id=chunk_id) for chunk_id in cut]
        else:
            below = list({tree.object_id: tree for tree in map(walk, _parts(node))}.values())
        object_id = _identify(node, contents) if changed else node.object_id
        objects[object_id] = node
        return ObjectTree(object_id=object_id, children=below)

    with no_object_id_recompute():
        tree = walk(message)
    message.metadata.__dict__["_message_id"] = tree.object_id
    return Packed(tree.object_id, objects, contents, tree)


def _parts(node: InflatableObject) -> list[InflatableObject]:
    """The objects below one; its `children` would deflate each of them for its id."""
    if isinstance(node, Message):
        return [node.content] if node.has_content() else []
    return list(node.values()) if isinstance(node, RecordDict | ArrayRecord) else []


def _identify(node: InflatableObject, contents: dict[str, bytes]) -> str:
    """Give an object its id, and keep the bytes that it is the hash of."""
    content = node.deflate()
    object_id = get_object_id(content)
    contents[object_id] = content
    node.__dict__["_object_id"] = object_id
    if "_is_dirty" in node.__dict__:
        node.__dict__["_is_dirty"] = False
    _get_computed_object_ids().add(object_id)
    return object_id


def _cut(array: Array) -> dict[str, bytes]:
    """Cut an array into chunks as Flower would, but keep the bytes that each id is the hash of.

    Flower deflates a chunk to hash it, and again to send it; for the one large object of a message
    that is a tenth of all the time it takes.
    """
    if "_chunks" in array.__dict__:
        return {}
    view, contents = memoryview(array.data), dict[str, bytes]()
    chunks: list[tuple[str, InflatableObject]] = []
    for start in range(0, len(view), CHUNK_BYTES):
        part = view[start : start + CHUNK_BYTES]
        # What `ArrayChunk.deflate` gives, with one copy of the data instead of two.
        content = b"".join((_CHUNK, b"%d" % len(part), HEAD_BODY_DIVIDER, part))
        object_id = get_object_id(content)
        contents[object_id] = content
        chunks.append((object_id, ArrayChunk(part)))
    array.__dict__["_chunks"] = chunks
    return contents


def _uncut(content: bytes) -> ArrayChunk | None:
    """A chunk of an array as a view of its deflated bytes; None if it is something else.

    Flower copies the bytes once to inflate the chunk and again to put the array together.
    """
    if not content.startswith(_CHUNK):
        return None
    head, divider = content[: len(_CHUNK) + 20], HEAD_BODY_DIVIDER
    return ArrayChunk(memoryview(content)[head.index(divider) + len(divider) :])


def unpack(
    root: str, contents: Mapping[str, bytes], *, arrays: dict[str, Array] | None = None
) -> Message:
    """Inflate a message from the bytes of all its objects.

    Parameters
    ----------
    root : str
        Object id of the message.
    contents : Mapping[str, bytes]
        Deflated objects by id.
    arrays : dict, optional
        Arrays inflated before, by id; new ones are added. Messages that share an array share no
        more than its immutable bytes: a record makes its own `Array` of each.

    Raises
    ------
    KeyError
        An object of the tree is missing.
    TypeError
        The root is not a message.
    """
    objects: dict[str, InflatableObject] = dict(arrays or {})
    for object_id, content in contents.items():
        if chunk := _uncut(content):
            objects[object_id] = chunk
    message = inflate_object_from_contents(root, dict(contents), objects=objects)
    if not isinstance(message, Message):
        raise TypeError(f"expected a message, got a {type(message).__name__}")
    if arrays is not None:
        arrays |= {key: found for key, found in objects.items() if isinstance(found, Array)}
    message.metadata.__dict__["_message_id"] = root
    return message


def verify(object_id: str, content: bytes) -> None:
    """Raise `ValueError` if `content` is not what `object_id` names."""
    if hashlib.sha256(content).hexdigest() != object_id:
        raise ValueError(f"an object arrived that does not have the id {object_id}")


def fresh_copy(message: Message) -> Message:
    """Deflate and inflate a message, keeping its message id.

    The copy has nothing cached in it, so Ray can ship it (a cached chunk can't be pickled).
    """
    message_id = message.metadata.message_id
    packed = pack(message)
    twin = unpack(packed.root, {key: packed.deflate(key) for key in packed.objects})
    for each in (message, twin):
        each.metadata.__dict__["_message_id"] = message_id
    return twin


def outline(message: Message) -> Message:
    """The message's address alone, of which later changes to the message change nothing."""
    return make_message(copy.copy(message.metadata), content=RecordDict())


def error_reply(instruction: Message, *, code: str, kind: int = APP_RAISED) -> Message:
    """A reply that says, by a stable code only, that there is no other reply."""
    return Message(Error(kind, code), reply_to=instruction)


@dataclass(frozen=True)
class LinkRun:
    """Flower's numbers for a run and for the task that stands for our round loop."""

    run_id: int
    task_id: int


def instruction(
    run: LinkRun, *, node: int, kind: str, group: str, ttl: float, content: RecordDict
) -> Message:
    """A message from this coordinator to a node."""
    address = (run.run_id, "", SUPERLINK_NODE_ID, node, "", group, time.time(), ttl, kind)
    return make_message(Metadata(*address, src_task_id=run.task_id), content)


def reply(
    run: LinkRun, *, node: int, kind: str, group: str, to: str, content: RecordDict | str
) -> Message:
    """A node's reply to the instruction `to`: its content, or the code of its refusal."""
    address = (run.run_id, "", node, SUPERLINK_NODE_ID, to, group, time.time(), 3600.0, kind)
    if isinstance(content, str):
        return make_message(Metadata(*address), error=Error(APP_RAISED, content))
    return make_message(Metadata(*address), content)


def disable_telemetry() -> None:
    """Keep Flower from reporting the run to its vendor, also if Flower is already imported."""
    telemetry.FLWR_TELEMETRY_ENABLED = "0"
