"""Trainers that lie, hang and die, started by the launcher in the place of the honest one.

What one does, the first number of the adapter says. It answers honestly what is asked before.
"""

import os
import resource
import signal
import socket
import sys
import time

import numpy as np

from silotune.client.errors import TrainerDiskFull, TrainerOutOfMemory
from silotune.client.training import messages as m
from silotune.models.layout import ArrayEntry, Layout

SIZE = 12
LAYOUT = Layout((ArrayEntry("head.weight", (3, 4), "head"),))
LOADED = m.ModelLoaded(layout=LAYOUT.to_json(), dtype="float32", device="cpu", attention="eager")
PREPARED = m.Prepared(records=5, rows_left_out=0, left_out=(), fingerprint="0" * 64)
FLATS = {
    "honest": np.ones(SIZE),
    "long": np.full(SIZE, 1e30),
    "nan": np.full(SIZE, np.nan),
    "short": np.ones(SIZE - 1),
    "float32": np.ones(SIZE, dtype=np.float32),
    "bytes": np.zeros(SIZE * 8, dtype=np.uint8),
    "oversized": np.zeros(1 << 20),
}


WAYS = [
    *("stuck", "killed", "segfault", "quits", "other", "garbage", "endless", "memory", "disk"),
    *FLATS,
]


def answer(connection, question, way):
    if way == "stuck":
        time.sleep(600)
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "segfault":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == "quits":
        sys.exit(3)
    if way == "other":
        return m.send(connection, PREPARED)
    if way == "garbage":
        return connection.sendall(b"\0\0\0\2\0\0\0\0\0\0\0\0{}")
    if way == "endless":
        return connection.sendall(b"\xff" * 12 + b" " * 1000)
    if way == "memory":
        code = TrainerOutOfMemory.code
        return m.send(connection, m.Failed(code=code, error="MemoryError", detail="no room"))
    if way == "disk":
        code = TrainerDiskFull.code
        return m.send(connection, m.Failed(code=code, error="OSError", detail="no space left"))
    if isinstance(question, m.AskTables):
        counts = {"honest": np.ones((2, 2)), "long": np.full((2, 2), -1e30)}[way]
        return m.send(connection, m.TablesCounted(), {"counts": counts})
    return m.send(connection, m.RoundDone(records=5), {"flat": FLATS[way]})


def main():
    connection = socket.socket(fileno=int(sys.argv[1]))
    m.send(connection, m.Begun(protections=()))
    while (asked := m.receive_question(connection)) is not None:
        question, arrays = asked
        match question:
            case m.Begin():
                m.send(connection, m.Begun(protections=()))
            case m.AskLayout():
                m.send(connection, m.LayoutFound(layout=LAYOUT.to_json()))
            case m.AskLoaded():
                m.send(connection, LOADED)
            case m.AskPrepared():
                m.send(connection, PREPARED)
            case _:
                answer(connection, question, WAYS[int(arrays["adapter"][0])])


if __name__ == "__main__":
    main()
