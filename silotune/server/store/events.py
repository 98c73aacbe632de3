"""Events on their way into the store: in order, many to a transaction, and few waits for the disk.

What decides something is written before the call returns. What only tells how a round goes on may wait a
moment for others, at most until the next thing that is written: a round of fifty sites then costs a
handful of transactions, not fifty. A crash can lose such lines of an unfinished round, which begins
anew, and the seconds and bytes of the newest round, but never the round.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from sqlalchemy import Connection, func, insert

from silotune.events.schema import written
from silotune.server.store.database import EVENTS, Store

_log = logging.getLogger(__name__)

_EVENT_LOCK = 0x51107E  # any number, the same in every process
_GATHER_SECONDS = 0.2
_PASSING = frozenset(
    {"round_started", "site_phase", "site_replied", "site_failed", "round_void", "round_finished"}
)

Row = dict[str, Any]
"""A row of the table of events."""


def event_row(run: str | None, kind: str, fields: Mapping[str, Any], now: float) -> Row:
    """An event as a row; `run` is None for the federation's own.

    Raises
    ------
    EventMalformed
        There is no such kind (`silotune.events.schema`), or the fields are not its own.
    """
    plain = jsonable(fields)
    written(kind, {"time": now, **plain})
    text = json.dumps(plain, separators=(",", ":"), allow_nan=False)
    return {"run": run, "time": now, "event": kind, "fields": text}


def add_events(connection: Connection, rows: Sequence[Row]) -> None:
    """Write events within a transaction, in order."""
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        # Ids are drawn before a transaction commits: without this, a reader could see number 8,
        # go on behind it, and never see the 7 that was committed later. SQLite has one writer.
        connection.execute(func.pg_advisory_xact_lock(_EVENT_LOCK).select())
    connection.execute(insert(EVENTS), list(rows))


class EventWriter:
    """Writes the events of one run. Safe for threads.

    Parameters
    ----------
    store : Store
        Where.
    run : str
        The run's name.
    on_event : callable
        Called, without arguments, after events are committed.
    gathers : bool
        Let what only tells how a round goes on wait a moment; `close` then has to be called.
    """

    def __init__(
        self, store: Store, run: str, *, on_event: Callable[[], None], gathers: bool = False
    ) -> None:
        self._store, self._run, self._on_event = store, run, on_event
        self._gathers = gathers
        self._writing = threading.RLock()  # held by who writes: rows are written as they came
        self._changed = threading.Condition()
        self._pending: list[Row] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._closing = False

    def append(self, kind: str, fields: Mapping[str, Any]) -> Row:
        """Record what happened; unless it may wait, it is on the disk on return.

        Raises
        ------
        EventMalformed
            The fields are not those of the kind.
        """
        row = event_row(self._run, kind, fields, time.time())
        if self._gathers and kind in _PASSING:
            self._put(row)
        else:
            with self.transaction() as connection:
                add_events(connection, [row])
        return row

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction with everything in it that waits, before what the block writes."""
        with self._writing:
            with self._changed:
                rows, self._pending = self._pending, []
            try:
                with self._store.transaction() as connection:
                    add_events(connection, rows)
                    yield connection
            except BaseException:
                with self._changed:
                    self._pending[:0] = rows
                raise
        self._on_event()

    def close(self) -> None:
        """Write what waits, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._pending and self._error is None:
            with self.transaction():
                pass

    def _put(self, row: Row) -> None:
        with self._changed:
            if self._error is not None:
                raise self._error
            self._pending.append(row)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._main, daemon=True, name=f"events of {self._run}"
                )
                self._thread.start()
            self._changed.notify_all()

    def _main(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                self._changed.wait_for(lambda: self._closing, timeout=_GATHER_SECONDS)
                if not self._pending:
                    if self._closing:
                        return
                    continue  # somebody else wrote them meanwhile
            try:
                with self.transaction():
                    pass
            except Exception as exc:
                _log.exception("events of %s can't be written", self._run)
                with self._changed:
                    self._error = exc  # for who appends the next one
                return


def jsonable(value: Any) -> Any:
    """Plain JSON data: NumPy to Python, NaN and infinity to null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
