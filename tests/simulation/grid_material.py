"""What the tests of the simulation's grid share."""

import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from silotune.errors import WorkerDied
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.pool import SiteSlot

FOUR = [SiteSlot("eye", 4.0), SiteSlot("heart", 3.0), SiteSlot("skin", 2.0), SiteSlot("bone", 2.0)]


def grid(workers, sites=FOUR, factory="build", **options):
    return WorkerGrid(f"grid_programs:{factory}", {"word": "x"}, sites, workers=workers, **options)


def arrays_of(values=(1.0, 2.0)):
    return ArrayRecord({"flat": Array(np.array(values, dtype=np.float32))})


def messages(nodes, *, values=(1.0, 2.0), kind="train", ttl=None, group="1", **config):
    content = RecordDict({"arrays": arrays_of(values), "config": ConfigRecord(config)})
    return [Message(content, node, kind, group_id=group, ttl=ttl) for node in nodes]


def by_node(replies):
    return {reply.metadata.src_node_id: reply for reply in replies}


def reasons(replies):
    return [reply.error.reason for reply in replies]


def pull_all(some_grid, ids, *, deaths=(), timeout=120.0):
    ends, missing, replies = time.monotonic() + timeout, set(ids), []
    while missing and time.monotonic() < ends:
        try:
            pulled = some_grid.pull_messages(missing)
        except WorkerDied as exc:
            deaths.append(exc)
            continue
        missing -= {reply.metadata.reply_to_message_id for reply in pulled}
        replies += pulled
        if missing and not pulled:
            some_grid.wait(1.0)
    assert not missing
    return replies


def by_id(replies):
    return {
        reply.metadata.reply_to_message_id: reply.content["update"]["flat"].numpy()
        for reply in replies
    }
