"""The workers of a simulation: who plays which site, who is ready, who died, who is asked what."""

from __future__ import annotations

import heapq
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from silotune.errors import SilotuneError, SiteFailed, WorkerDied, catalogue
from silotune.simulation.frames import Arrays, Frame, pack_arrays, unpack_arrays
from silotune.simulation.links import InlineLink, Link, ProcessLink, end_all
from silotune.simulation.workers import Assignment

Inspection = tuple[dict[str, Any], dict[str, np.ndarray]]


@dataclass(frozen=True)
class SiteSlot:
    """A simulated site: its name, and its work relative to the others' (say, its records)."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class WorkerReady:
    """A worker has loaded its program, `seconds` after it began to."""

    worker: int
    sites: tuple[str, ...]
    seconds: float


@dataclass
class _Question:
    waiting: set[int]
    answers: dict[int, Frame] = field(default_factory=dict)


def spread(weights: Sequence[float], workers: int) -> list[tuple[int, ...]]:
    """Share sites out to workers: longest processing time first (Graham, 1969).

    Returns
    -------
    list of tuple of int
        Site indices of each worker; at most as many workers as there are sites.
    """
    loads = [(0.0, worker) for worker in range(min(workers, len(weights)))]
    shares: list[list[int]] = [[] for _ in loads]
    for site in sorted(range(len(weights)), key=lambda site: (-weights[site], site)):
        load, worker = heapq.heappop(loads)
        shares[worker].append(site)
        heapq.heappush(loads, (load + weights[site], worker))
    return [tuple(sorted(share)) for share in shares]


class WorkerPool:
    """Workers, each with its sites. They start at once and in parallel.

    Parameters
    ----------
    factory, payload, run_id
        As of `silotune.simulation.workers.Assignment`.
    sites : Sequence[SiteSlot]
        All sites.
    workers : int
        Processes; 0 for none: the calling thread plays the sites.
    log_folder : Path, optional
        Where ``worker-0.log`` and so on go; standard error if absent.
    on_frame : callable
        Called with ``(worker, frame)`` for every frame that is about messages.
    on_death : callable
        Called, with `state` locked, with the worker that ended.

    Attributes
    ----------
    state : threading.Condition
        Guards everything here and what the owner keeps; notified whenever something changed.
    names : tuple of str
        The sites' names.
    worker_of : tuple of int
        The worker of each site.
    dead : set of int
        Workers that ended before they were asked to.
    """

    def __init__(
        self,
        *,
        factory: str,
        payload: Mapping[str, Any],
        sites: Sequence[SiteSlot],
        workers: int,
        run_id: int,
        log_folder: Path | None,
        on_frame: Callable[[int, Frame], object],
        on_death: Callable[[int], object],
    ) -> None:
        if not sites or workers < 0:
            raise ValueError("a simulation needs at least one site and no negative workers")
        self.names = tuple(slot.name for slot in sites)
        if len(set(self.names)) != len(sites):
            raise ValueError("two sites have the same name")
        self.state = threading.Condition()
        self.dead: set[int] = set()
        self._on_frame, self._on_death = on_frame, on_death
        self._ready: list[WorkerReady] = []
        self._bad_news: list[SilotuneError] = []
        self._questions: dict[int, _Question] = {}
        self._asked = 0
        self._closed = False
        shares = spread([slot.weight for slot in sites], max(1, workers))
        by_site = {site: worker for worker, share in enumerate(shares) for site in share}
        self.worker_of = tuple(by_site[site] for site in range(len(sites)))
        self.links: list[Link] = [
            InlineLink(index, share)
            if workers == 0
            else ProcessLink(index, share, log=log_folder and log_folder / f"worker-{index}.log")
            for index, share in enumerate(shares)
        ]
        for link in self.links:
            assignment = Assignment(
                factory=factory,
                payload=payload,
                sites={site: self.names[site] for site in link.sites},
                num_sites=len(sites),
                run_id=run_id,
            )
            link.begin(assignment, on_frame=self._hear, on_end=self._end)

    def close(self) -> None:
        """End the workers, whatever they are doing. Does nothing the second time."""
        with self.state:
            if self._closed:
                return
            self._closed = True
        end_all(self.links)

    def wait_until_ready(self, on_ready: Callable[[WorkerReady], object] | None) -> None:
        """Wait for every worker to load its program. See `WorkerGrid.wait_until_ready`."""
        told = 0

        def changed() -> bool:
            return len(self._ready) > told or bool(self.dead)

        while told < len(self.links):
            with self.state:
                self.wait_for(changed)
                self.raise_bad_news()
                news = self._ready[told:]
                if not news:
                    raise WorkerDied("a worker ended before it was ready")
            for ready in news:
                told += 1
                if on_ready:
                    on_ready(ready)

    def advance(self) -> bool:
        """Let a worker that is the calling thread do one thing; whether there was one."""
        return any(link.step() for link in self.links)

    def wait_for(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until `condition` holds, or for `timeout` seconds. The caller holds `state`."""
        while not condition() and self.advance():
            pass
        return self.state.wait_for(condition, timeout)

    def raise_bad_news(self) -> None:
        """Raise, once, why a worker ended. The caller holds `state`."""
        if self._bad_news:
            raise self._bad_news.pop(0)

    def inspect_all(
        self, request: Mapping[str, Any], arrays: Arrays, sites: Iterable[str] | None
    ) -> dict[str, Inspection]:
        """Ask the sites' programs. See `WorkerGrid.inspect_all`."""
        chosen = self._indices(sites)
        described, blobs = pack_arrays(arrays)
        question = _Question(set(chosen))
        with self.state:
            self._asked += 1
            ticket = self._asked
            self._questions[ticket] = question
        head = {"ticket": ticket, "request": json.dumps(request), "arrays": described}
        try:
            for link in self.links:
                if mine := [site for site in link.sites if site in question.waiting]:
                    link.send(Frame("inspect", {**head, "sites": mine}, blobs))
            self._await_answers(question)
        finally:
            with self.state:
                del self._questions[ticket]
        return {self.names[site]: self._answer(site, question.answers[site]) for site in chosen}

    # --- inspection ---

    def _indices(self, sites: Iterable[str] | None) -> list[int]:
        chosen = set(self.names if sites is None else sites)
        if unknown := chosen - set(self.names):
            raise ValueError(f"no such site: {', '.join(sorted(unknown))}")
        return [site for site, name in enumerate(self.names) if name in chosen]

    def _await_answers(self, question: _Question) -> None:
        def orphaned() -> set[int]:
            return {site for site in question.waiting if self.worker_of[site] in self.dead}

        with self.state:
            self.wait_for(lambda: not question.waiting or bool(orphaned()))
            if lost := orphaned():
                self.raise_bad_news()
                raise WorkerDied(f"the worker of {self.listed(lost)} is gone")

    def _answer(self, site: int, frame: Frame) -> Inspection:
        if code := frame.header.get("failed"):
            raise SiteFailed(f"{self.names[site]}: inspection failed with {code}; see worker's log")
        arrays = unpack_arrays(frame.header["arrays"], frame.blobs)
        return json.loads(frame.header["answer"]), arrays

    def listed(self, sites: Iterable[int]) -> str:
        """Sites' names, for people."""
        return ", ".join(self.names[site] for site in sorted(sites))

    # --- called on the hearing threads ---

    def _hear(self, worker: int, frame: Frame) -> None:
        head = frame.header
        if frame.kind not in {"ready", "failed", "inspected"}:
            self._on_frame(worker, frame)
            return
        with self.state:
            if frame.kind == "ready":
                played = tuple(self.names[site] for site in self.links[worker].sites)
                self._ready.append(WorkerReady(worker, played, head["seconds"]))
            elif frame.kind == "failed":
                self._bad_news.append(_as_error(worker, code=head["code"], detail=head["detail"]))
                self.dead.add(worker)
                self._on_death(worker)
            elif question := self._questions.get(head["ticket"]):
                question.waiting.discard(head["site"])
                question.answers[head["site"]] = frame
            self.state.notify_all()

    def _end(self, worker: int, ending: str) -> None:
        with self.state:
            if self._closed or worker in self.dead:
                return
            self.dead.add(worker)
            sites = self.listed(self.links[worker].sites)
            self._bad_news.append(WorkerDied(f"worker {worker} {ending}; it played {sites}"))
            self._on_death(worker)
            self.state.notify_all()


def _as_error(worker: int, *, code: str, detail: str) -> SilotuneError:
    """The error that kept a worker from starting, as this process would have raised it."""
    known = {cls.code: cls for cls in catalogue()}
    if code in known and code != SilotuneError.code:
        return known[code](detail)
    return WorkerDied(f"worker {worker} could not start ({detail}); its log has the traceback")
