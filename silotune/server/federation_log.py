"""What happens in the federation outside of any run: enrolments, alarms, people, who is silent."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import select

from silotune.events.source import Row, RunFacts
from silotune.server.event_writer import add_events, event_row
from silotune.server.run_store import Event, Runs
from silotune.server.store import Store
from silotune.server.tables import EVENTS

_ENDLESS = "running"


class FederationLog:
    """The federation's own events, to write and, for `silotune.events.feed.Feed`, to read.

    Parameters
    ----------
    store : Store
        Where.
    on_event : callable
        Called, without arguments, after an event is committed.
    """

    def __init__(self, store: Store, *, on_event: Callable[[], None]) -> None:
        self._store, self._on_event = store, on_event
        self._runs = Runs(store)

    def append(self, event: str, /, **fields: Any) -> None:
        """Record what happened; on return it is on the disk."""
        with self._store.transaction() as connection:
            add_events(connection, [event_row(None, event, fields, time.time())])
        self._on_event()

    def facts(self, run: str) -> RunFacts:
        """A log without an end."""
        return RunFacts(
            run=run, name="", purpose="", state=_ENDLESS, round=0, rounds=0, proposed_at=None
        )

    def events(self, run: str, *, after: int = 0, limit: int = 100_000) -> list[Row]:
        """Events behind an id, oldest first."""
        del run
        return [event.as_dict() for event in self._runs.events(None, after=after, limit=limit)]

    def newest(self, kind: str, *, limit: int = 50) -> list[Row]:
        """The newest events of a kind, newest first."""
        query = (
            select(EVENTS)
            .where(EVENTS.c.run.is_(None), EVENTS.c.event == kind)
            .order_by(EVENTS.c.id.desc())
            .limit(limit)
        )
        with self._store.transaction() as connection:
            rows = list(connection.execute(query).mappings())
        return [Event.of(row).as_dict() for row in rows]
