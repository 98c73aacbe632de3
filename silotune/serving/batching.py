"""Requests gathered into batches: a bounded queue, a deadline, and one thread that computes.

A model answers several texts in little more time than one. So what waits is computed together: whatever
came while the last batch was under way, at most so many examples. A request that can't be computed
within its deadline is refused at once or when its time is over, never computed for nobody.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from silotune.errors import SilotuneError
from silotune.models.prediction import Prediction
from silotune.serving.errors import ServerBusy

Example = TypeVar("Example")


@dataclass(frozen=True, kw_only=True)
class Waiting(Generic[Example]):
    """A request in the queue: its examples, its end, and where the answer goes."""

    examples: Sequence[Example]
    until: float
    answer: Future[list[Prediction]] = field(default_factory=Future)


class Batcher(Generic[Example]):
    """One thread that answers requests in batches.

    Parameters
    ----------
    predict : callable
        Predictions of examples, in order.
    most : int
        Examples of a batch.
    waiting : int
        Examples that may wait; more are refused.
    seconds : float
        How long a request may take, waiting included.
    computed : callable
        Told the number of examples of each batch and its seconds.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[Example]], list[Prediction]],
        *,
        most: int,
        waiting: int,
        seconds: float,
        computed: Callable[[int, float], None] = lambda examples, seconds: None,
    ) -> None:
        self._predict, self._computed = predict, computed
        self._most, self._room, self.seconds = most, waiting, seconds
        self._queue: deque[Waiting[Example]] = deque()
        self._size = 0
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="silotune-batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Examples that wait."""
        return self._size

    def ask(self, examples: Sequence[Example]) -> Future[list[Prediction]]:
        """Put examples into the queue.

        Raises
        ------
        ServerBusy
            It is full, or the server shuts down.
        """
        one = Waiting(examples=examples, until=time.monotonic() + self.seconds)
        with self._changed:
            if self._closed:
                raise ServerBusy("the server is shutting down")
            if self._size + len(examples) > self._room:
                raise ServerBusy(f"{self._size} examples wait already")
            self._queue.append(one)
            self._size += len(examples)
            self._changed.notify()
        return one.answer

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            # From here on nobody can take a request back; who gave up has done so already.
            live = [one for one in batch if one.answer.set_running_or_notify_cancel()]
            now = time.monotonic()
            for late in [one for one in live if one.until <= now]:
                late.answer.set_exception(ServerBusy("its deadline is over"))
                live.remove(late)
            if live:
                self._answer(live)

    def _next(self) -> list[Waiting[Example]]:
        """What is computed next: at least a request, and as many more as fit; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            batch: list[Waiting[Example]] = []
            room = self._most
            while self._queue and (not batch or len(self._queue[0].examples) <= room):
                one = self._queue.popleft()
                self._size -= len(one.examples)
                room -= len(one.examples)
                batch.append(one)
            return batch

    def _answer(self, batch: Sequence[Waiting[Example]]) -> None:
        try:
            started = time.monotonic()
            found = self._predict([example for one in batch for example in one.examples])
            self._computed(len(found), time.monotonic() - started)
        except Exception as exc:
            if len(batch) > 1:  # one of them is at fault: the others get their answers
                for one in batch:
                    self._answer([one])
                return
            # A library's own message may quote a text; ours never do.
            told = exc if isinstance(exc, SilotuneError) else SilotuneError(type(exc).__name__)
            batch[0].answer.set_exception(told)
            return
        start = 0
        for one in batch:
            one.answer.set_result(found[start : start + len(one.examples)])
            start += len(one.examples)
