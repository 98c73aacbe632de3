"""A run's curves: one number a round under a name, with the time at which it became known.

Nothing is in them that the run's events do not tell: metrics that sites released (or, of a simulation,
what the simulator saw), epsilon, seconds, bytes and the norm of the update.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.dashboard.spending import Spending
from silotune.events.schema import Evaluated, RoundFinished, RoundStarted, parse
from silotune.events.source import Row, RunDirectories, RunFacts
from silotune.events.view import RunView
from silotune.plan import dotted

if TYPE_CHECKING:
    from silotune.server.control_client import ControlClient

_PER_ROUND = ("seconds", "wait_seconds", "aggregate_seconds", "bytes_up", "bytes_down")


@dataclass(frozen=True)
class Point:
    """One value of a curve: the round, the Unix time at which it became known, the value."""

    round: int
    time: float
    value: float


@dataclass(frozen=True, kw_only=True)
class RunCurves:
    """A run as other tools take it.

    Attributes
    ----------
    facts : RunFacts
        The run.
    curves : mapping of str to list of Point
        By name, such as ``released/validation/macro_f1`` or ``epsilon/north``; rounds ascend.
    began, ended : float or None
        Unix times of the first and of the last event.
    """

    facts: RunFacts
    curves: Mapping[str, Sequence[Point]]
    began: float | None
    ended: float | None

    @property
    def settings(self) -> dict[str, str]:
        """The plan's settings by dotted key, and its hash, as text."""
        plain = {key: str(value) for key, value in dotted(self.facts.plan).items()}
        return {**plain, "plan_sha256": self.facts.plan_sha256}


def of_directory(folder: Path) -> RunCurves:
    """The curves of a run directory, also while the run goes on.

    Raises
    ------
    RunDirectoryInvalid
        It is none.
    EventMalformed
        Its events were edited.
    """
    source = RunDirectories(folder)
    run = folder.resolve().name
    return collect(source.facts(run), source.events(run))


def of_coordinator(client: ControlClient, run: str) -> RunCurves:
    """The curves of a coordinator's run, through its admin API. Raises what the coordinator names."""
    row = client.call("GetRun", client.messages.RunRef(run=run))
    signed = json.loads(client.download(run, "plan.json"))
    lines = client.download(run, "events.jsonl").splitlines()
    facts = RunFacts(
        run=run,
        name=row["name"],
        purpose=row["purpose"],
        state=row["state"],
        round=row["round"],
        rounds=row["rounds"],
        proposed_at=row["proposed_at"],
        plan_sha256=row["plan_sha256"],
        plan=json.loads(signed["plan"]),
    )
    return collect(facts, [json.loads(line) for line in lines])


def collect(facts: RunFacts, rows: Sequence[Row]) -> RunCurves:
    """Curves of a run's events; a round that was begun again counts as it ended."""
    found: dict[str, dict[int, Point]] = {}
    view = RunView(facts.run)
    for row in rows:
        event = parse(row)
        view.add(event)
        if isinstance(event, RoundStarted):
            for curve in found.values():
                for number in [n for n in curve if n >= event.round]:
                    del curve[number]
        for name, value in _told(event):
            if value is not None and math.isfinite(value):
                number = int(getattr(event, "round", 0))
                found.setdefault(name, {})[number] = Point(number, event.time, float(value))
    times = {p.round: p.time for p in found.get("round/bytes_up", {}).values()}
    for site, spent in Spending().curves(facts, view, wait=True).items():
        found[f"epsilon/{site}"] = {n: Point(n, times[n], v) for n, v in spent if n in times}
    return RunCurves(
        facts=facts,
        curves={name: [c[n] for n in sorted(c)] for name, c in sorted(found.items()) if c},
        began=float(rows[0]["time"]) if rows else None,
        ended=float(rows[-1]["time"]) if rows else None,
    )


def _told(event: Any) -> Iterator[tuple[str, float | None]]:
    """Names and values that one event adds to curves."""
    if isinstance(event, RoundFinished):
        for key in _PER_ROUND:
            yield f"round/{key}", getattr(event, key)
        yield "round/update_norm", event.update_norm
    elif isinstance(event, Evaluated):
        stem = f"{event.view}/{event.split or 'held-out'}"
        for metric, value in event.pooled.items():
            yield f"{stem}/{metric}", value
