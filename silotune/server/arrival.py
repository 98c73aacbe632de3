"""Waking threads that wait for something to arrive."""

from __future__ import annotations

import threading


class Signal:
    """Something happened: threads wait for the next time, and miss none in between."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._count = 0

    @property
    def count(self) -> int:
        """How often it happened so far."""
        return self._count

    def fire(self) -> None:
        """It happened."""
        with self._condition:
            self._count += 1
            self._condition.notify_all()

    def wait(self, *, since: int, seconds: float) -> int:
        """Wait until it happened more than `since` times, or `seconds` are over; the count then."""
        with self._condition:
            self._condition.wait_for(lambda: self._count > since, timeout=seconds)
            return self._count
