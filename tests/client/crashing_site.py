"""A small site for crash tests: it trains by sleeping, releases at its gate, and writes to a wire.

Run it in a process of its own. The wire stands for the network: what is in it has left the site.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from dp_accounting import SelfComposedDpEvent

from silotune.client.gate import DpRelease, Gate
from silotune.client.run_files import MEMORY, OUTBOX, RunFiles, SealedMemory
from silotune.plan.plan import Plan
from silotune.privacy.events import gaussian_event
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey

DELTA = 1e-5
EVENT = gaussian_event(8.0)
PLAN = Plan.from_mapping(
    {
        "plan": {"name": "crash", "purpose": "test"},
        "model": {"base": "nowhere", "task": "causal_lm"},
        "data": {"dataset": "notes"},
        "rounds": {"number": 1000},
        "privacy": {"mode": "record", "epsilon": 8.0, "delta": DELTA, "clip": 1.0, "batch": 10},
    }
)


BANDED = PLAN.override(
    {
        "privacy.bands": 3,
        "privacy.band_weights": [1.0, 0.5, 0.25],
        "optimizer.server": {"name": "sgd"},
    }
)


def plan_in(folder: Path) -> Plan:
    """A folder with a file ``banded`` is of a site whose noise is correlated over rounds."""
    return BANDED if (folder / "banded").exists() else PLAN


def memory_in(folder: Path, gate: Gate) -> SealedMemory:
    files = RunFiles(folder, MEMORY, run="run")
    return SealedMemory(files, released=lambda number: gate.released(key(number)), kept=3)


def key(number: int) -> ReleaseKey:
    return ReleaseKey("run", number, "update")


def open_site(folder: Path) -> tuple[Ledger, Gate]:
    ledger = Ledger(folder / "ledger.sqlite")
    whole = SelfComposedDpEvent(EVENT, 1000)
    plan = plan_in(folder)
    ledger.reserve("notes", "run", plan.sha256, whole, budget=Budget(1000.0, DELTA))
    gate = Gate(
        ledger=ledger, dataset="notes", plan=plan, outbox=RunFiles(folder, OUTBOX, run="run")
    )
    return ledger, gate


def answer(folder: Path, gate: Gate, number: int) -> str:
    """One request: recall, or train and release, then send. Noise is new each time, as it must be.

    Returns the identity of the content that was sent.
    """
    reply = gate.recall(key(number))
    if reply is None:
        gate.charge(key(number), {"step": EVENT})
        time.sleep(0.001)
        noise = np.frombuffer(os.urandom(512), dtype=np.uint8).astype(np.float32)
        beside = None
        if plan_in(folder) is BANDED:
            memory = memory_in(folder, gate)
            memory.all(range(max(1, number - 2), number))  # raises if a row that left is gone
            memory.keep(number, {"noise": noise})
            beside = partial(memory.promote, number)
        reply = gate.release(
            key(number),
            fields={"update": DpRelease(noise, mechanism="step")},
            mechanisms={"step": EVENT},
            beside=beside,
        )
    out = os.open(folder / "wire", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(out, f"{number} {reply.object_id}\n".encode())
    os.close(out)
    return reply.object_id


def wire(folder: Path) -> list[tuple[int, str]]:
    """What has left the site: round and content."""
    path = folder / "wire"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(number), content) for number, content in map(str.split, lines)]


def serve(folder: Path) -> None:
    """Answer round after round for ever; the last round of before is asked for again."""
    _, gate = open_site(folder)
    sent = wire(folder)
    number = sent[-1][0] if sent else 1
    while True:
        answer(folder, gate, number)
        number += 1


def crash_at(folder: Path, step: int) -> None:
    """Answer round 2, but die before the `step`-th durable step. Exit code 0 if there are fewer."""
    _, gate = open_site(folder)
    left = iter(range(step))

    def count(*_: object) -> None:
        if next(left, None) is None:
            os._exit(9)

    gate._ledger._table._db.set_trace_callback(count)  # every SQL statement, before it runs
    for name in ("open", "fsync", "replace", "rename", "unlink"):
        setattr(os, name, _after(count, getattr(os, name)))
    answer(folder, gate, 2)
    os._exit(0)


def _after(count: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        count()
        return call(*args, **kwargs)

    return counted
