"""Several sites' answers at a time, which meet where they train.

Each answer runs as it would alone, through the site's app, its books and its gate, up to where the site
would train; there it waits. When all are there, they train together (`silotune.client.together`), and
go on one after the other. An answer has a thread of its own so that it can wait in the middle, and for
nothing else: never do two of them run at the same time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from silotune.client.model_cache import LocalTraining, ModelCache
from silotune.client.together import JointMember, changes, groups
from silotune.client.training.base import Prior, Trained, TrainingJob, Vector

logger = logging.getLogger("silotune.simulation.worker")


class JointAnswers:
    """Where the sites of a worker meet to train.

    Attributes
    ----------
    most : int
        How many at a time.
    """

    def __init__(self) -> None:
        self.most = 1
        self._current: _Answer | None = None

    def run(self, jobs: Sequence[Callable[[], object]]) -> Iterator[tuple[int, float]]:
        """Do jobs, as many as there are, and let them meet.

        Yields
        ------
        number : int
            Of a job that is done.
        seconds : float
            What it took, with its share of what it did together with others.
        """
        waiting = {number: _Answer(job) for number, job in enumerate(jobs)}
        for number, answer in list(waiting.items()):
            yield from self._go_on(number, answer, waiting)
        met = [(n, one.member) for n, one in waiting.items() if one.member is not None]
        for group in groups([member for _, member in met]):
            numbers, members = zip(*(met[place] for place in group), strict=True)
            began = time.perf_counter()
            found = _changes(members)
            share = (time.perf_counter() - began) / len(members)
            for number, change in zip(numbers, found, strict=True):
                waiting[number].receive(change, share)
                yield from self._go_on(number, waiting[number], waiting)

    def change(self, member: JointMember) -> tuple[Vector | None, float]:
        """Wait for an answer's change of a round, and what it took; None if it is to train alone."""
        if self._current is None:
            return None, 0.0
        return self._current.wait(member)

    def _go_on(
        self, number: int, answer: _Answer, waiting: dict[int, _Answer]
    ) -> Iterator[tuple[int, float]]:
        self._current = answer
        answer.go_on()
        self._current = None
        if answer.done:
            del waiting[number]
            yield number, answer.seconds


class _Answer:
    """One job on a thread of its own, which runs only while `go_on` waits for it."""

    def __init__(self, job: Callable[[], object]) -> None:
        self.member: JointMember | None = None
        self.done, self.seconds = False, 0.0
        self._change: tuple[Vector | None, float] = None, 0.0
        self._job, self._going, self._still = job, threading.Semaphore(0), threading.Semaphore(0)
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def go_on(self) -> None:
        """Let it run until it waits, or to its end. Raises what the job raised."""
        began = time.perf_counter()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="silotune-answer", daemon=True)
            self._thread.start()
        else:
            self._going.release()
        self._still.acquire()
        self.seconds += time.perf_counter() - began
        if self._failure is not None:
            raise self._failure

    def receive(self, change: Vector | None, seconds: float) -> None:
        """Have what it waits for."""
        self._change = change, seconds
        self.seconds += seconds

    def wait(self, member: JointMember) -> tuple[Vector | None, float]:
        """Stop the job until what it waits for is there; once only."""
        if self.member is not None:
            return None, 0.0
        self.member = member
        self._still.release()
        self._going.acquire()
        return self._change

    def _run(self) -> None:
        try:
            self._job()
        except BaseException as exc:
            self._failure = exc
        self.done = True
        self._still.release()


def _changes(members: Sequence[JointMember]) -> list[Vector | None]:
    """The changes of a group; of those that could not be computed together none."""
    if len(members) == 1:
        return [None]
    try:
        return changes(members)
    except Exception:
        logger.exception("%d sites could not train together; each does alone", len(members))
        return [None] * len(members)


class SimulatedTraining(LocalTraining):
    """A training that meets those of other sites, if it is asked among them.

    Parameters
    ----------
    job, models
        As of `LocalTraining`.
    joint : JointAnswers
        Where they meet.
    """

    def __init__(self, job: TrainingJob, models: ModelCache, *, joint: JointAnswers) -> None:
        super().__init__(job, models)
        self._joint = joint

    def round(
        self, adapter: Vector, server_round: int, *, clip: float | None, prior: Prior | None
    ) -> Trained:
        """The steps of a round, with those of others where that gives the same numbers."""
        if not self.job.plan.only_sums:
            member = self.member(adapter, server_round, prior=prior)
            change, seconds = self._joint.change(member)
            if change is not None:
                return self.ended(member, change, seconds=seconds)
        return super().round(adapter, server_round, clip=clip, prior=prior)
