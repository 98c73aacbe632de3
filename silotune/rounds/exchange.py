"""One exchange with the sites: messages out, replies in as they come, a deadline.

Arrays and a JSON-able state as one safetensors file, in memory: equal content, equal bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from silotune.events import tracing
from silotune.plan.document import canonical_json
from silotune.protocol.errors import StoreUnusable

_POLL_SECONDS = 0.05


def exchange(
    grid: Grid, messages: Iterable[Message], *, deadline: float
) -> Iterator[tuple[int, Message]]:
    """Send messages and yield ``(node, reply)`` pairs until all replied or time is up.

    Parameters
    ----------
    grid : Grid
        Any Flower grid. One with a ``wait(seconds)`` method is waited on, another polled.
    messages : iterable of Message
        At most one a node.
    deadline : float
        Seconds after which missing replies are given up.

    Notes
    -----
    The node is the one the message went to: an error that the transport raised for a lost site does
    not carry that site's id as its source.
    """
    outgoing = list(messages)
    with _traced(outgoing):
        yield from _exchanged(grid, outgoing, deadline)


def _exchanged(
    grid: Grid, outgoing: list[Message], deadline: float
) -> Iterator[tuple[int, Message]]:
    ends = time.monotonic() + deadline
    sent = grid.push_messages(outgoing)
    pending = {
        message_id: message.metadata.dst_node_id
        for message_id, message in zip(sent, outgoing, strict=True)
        if message_id
    }
    wait: Callable[[float], object] = getattr(grid, "wait", time.sleep)
    while pending and time.monotonic() < ends:
        replies = list(grid.pull_messages(list(pending)))
        for reply in replies:
            yield pending.pop(reply.metadata.reply_to_message_id), reply
        if not replies:
            wait(_POLL_SECONDS)


@contextmanager
def _traced(outgoing: list[Message]) -> Iterator[None]:
    """One span around it all, and its ``traceparent`` in every message, while traces are on."""
    if not outgoing:
        yield
        return
    first = outgoing[0]
    config = first.content.config_records["config"]
    run, number = str(config["run"]), int(config.get("round", 0))  # type: ignore[arg-type]
    with tracing.exchange(first.metadata.message_type, run=run, round=number) as header:
        if header:
            for message in outgoing:
                settings = message.content.config_records["config"]
                # A record of its own: the grid may keep the one of an earlier exchange.
                message.content["config"] = ConfigRecord({**settings, tracing.TRACEPARENT: header})
        yield


_STATE = "silotune"

Arrays = dict[str, NDArray[Any]]


def packed(arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> bytes:
    """One file of arrays, and of a state under the file's metadata."""
    # safetensors writes a strided view's base buffer; order="C" copies only what isn't contiguous.
    content = {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}
    text = canonical_json(state)
    return bytes(save(content, metadata={_STATE: text}))


def unpacked(content: bytes) -> tuple[Arrays, dict[str, Any]]:
    """Read what `packed` wrote. Raises `StoreUnusable`."""
    try:
        arrays = dict(load(content))  # checks the header and every offset
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return arrays, json.loads(header.get("__metadata__", {}).get(_STATE, "{}"))
    except (SafetensorError, ValueError, AttributeError) as exc:
        raise StoreUnusable("a stored adapter or checkpoint is damaged") from exc
