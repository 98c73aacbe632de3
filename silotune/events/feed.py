"""Events as they come, for any number of watchers: each event is read once, whoever watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from silotune.events.source import Row, RunFacts

OVER = frozenset({"finished", "stopped", "failed", "interrupted"})
"""States after which nothing more happens in a run."""

_LOOK_SECONDS = 0.5
_BATCH_SECONDS = 2.0  # at least between two batches: each is a message to each watcher
_KEPT = 2000  # events that late watchers need not read for themselves


class Readable(Protocol):
    """Where the events of something that goes on are read: any `silotune.events.source.Source`."""

    def facts(self, run: str) -> RunFacts:
        """Its state."""
        ...

    def events(self, run: str, *, after: int = 0) -> list[Row]:
        """Events behind an id, oldest first."""
        ...


@dataclass(frozen=True, eq=False)
class Batch:
    """Events that came together, and the run's state then; the same object for every watcher.

    So whoever turns it into bytes can do that once: it is hashed by what it is, not by what it holds.
    """

    rows: tuple[Row, ...] = ()
    state: str = ""


@dataclass
class _Tail:
    """The newest events of a run; `rows` has every event behind `base`."""

    base: int
    rows: list[Row] = field(default_factory=list)
    state: str = ""
    batches: dict[int, Batch] = field(default_factory=dict)
    over: bool = False
    watchers: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    pump: asyncio.Task[None] | None = None
    error: Exception | None = None

    @property
    def newest(self) -> int:
        return int(self.rows[-1]["id"]) if self.rows else self.base

    def behind(self, after: int) -> Batch:
        """Events behind an id; until there are more, the same object for the same id."""
        if after not in self.batches:
            rows = tuple(row for row in self.rows if row["id"] > after)
            self.batches[after] = Batch(rows, self.state)
        return self.batches[after]

    def wake(self) -> None:
        self.batches.clear()
        self.news.set()
        self.news = asyncio.Event()


class Feed:
    """Live events of a source, within one event loop.

    A source is looked at four times a second while somebody watches: what happens in between goes
    to every watcher at once, so that many of them cost little more than one.

    Parameters
    ----------
    source : Readable
        Where events are read, in a thread of their own.
    """

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._tails: dict[str, _Tail] = {}

    async def follow(
        self, run: str, *, after: int = 0, keep_alive: float = 15.0
    ) -> AsyncGenerator[Batch, None]:
        """Batches of events behind an id, until the run is over.

        An empty batch comes when nothing happened for `keep_alive` seconds.

        Raises
        ------
        RunNotFound
            There is no such run.
        """
        await asyncio.to_thread(self._source.facts, run)
        tail = self._tails.setdefault(run, _Tail(base=after))
        tail.watchers += 1
        if tail.pump is None:
            tail.pump = asyncio.create_task(self._pump(run, tail))
        try:
            while True:
                news = tail.news
                if after < tail.base:
                    older = await asyncio.to_thread(self._source.events, run, after=after)
                    batch = Batch(tuple(older), tail.state)
                else:
                    batch = tail.behind(after)
                if batch.rows:
                    after = int(batch.rows[-1]["id"])
                    yield batch
                elif tail.error is not None:
                    raise tail.error
                elif tail.over:
                    return
                elif not await _set_within(news, keep_alive):
                    yield Batch()
        finally:
            tail.watchers -= 1
            if not tail.watchers:
                tail.pump.cancel()
                self._tails.pop(run, None)

    def _look(self, run: str, newest: int) -> tuple[RunFacts, list[Row]]:
        """How a run is, and its events behind an id."""
        # The state first: an event of it may be written a moment later, and is seen then.
        facts = self._source.facts(run)
        return facts, self._source.events(run, after=newest)

    async def _pump(self, run: str, tail: _Tail) -> None:
        was_over = False
        try:
            while True:
                facts, found = await asyncio.to_thread(self._look, run, tail.newest)
                tail.rows += found
                if len(tail.rows) > 2 * _KEPT:
                    tail.base = int(tail.rows[-_KEPT - 1]["id"])
                    del tail.rows[:-_KEPT]
                tail.state = facts.state
                tail.over = was_over and not found
                was_over = facts.state in OVER
                if found or tail.over:
                    tail.wake()
                if tail.over:
                    return
                await asyncio.sleep(_BATCH_SECONDS if found else _LOOK_SECONDS)
        except Exception as exc:
            tail.error = exc  # for the watchers to raise
            tail.wake()


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
