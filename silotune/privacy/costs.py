"""What events cost, computed in this process or, once it asked for that, by one that ends again.

The libraries of accounting take 90 MB. A site's daemon, which is idle most of the time, calls
`compute_apart` at its start: it then asks a process of its own, which ends some seconds after the last
question.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from silotune.errors import SilotuneError, catalogue
from silotune.privacy.errors import CostsUnknown
from silotune.privacy.events import DpEvent, from_json, to_json

_LINGER = 5.0  # seconds that the process waits for another question
_LONGEST = 600.0
_MOST_KEPT, _MOST_ANSWER = 4096, 1 << 16


def epsilon(events: Iterable[DpEvent], *, delta: float, colluding: int = 0) -> float:
    """See `silotune.privacy.accounting.epsilon`."""
    if _apart is None:
        from silotune.privacy import accounting

        return float(accounting.epsilon(events, delta=delta, colluding=colluding))
    return _apart.ask("epsilon", events, delta=delta, colluding=colluding)


def epsilon_at_two_sites(events: Iterable[DpEvent], *, delta: float) -> float:
    """See `silotune.privacy.accounting.epsilon_at_two_sites`."""
    if _apart is None:
        from silotune.privacy import accounting

        return accounting.epsilon_at_two_sites(events, delta=delta)
    return _apart.ask("epsilon_at_two_sites", events, delta=delta)


def calibrate(
    *, epsilon: float, delta: float, rate: float, steps: int, extra: Sequence[DpEvent] = ()
) -> float:
    """See `silotune.privacy.accounting.calibrate`."""
    asked: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "rate": rate, "steps": steps}
    if _apart is None:
        from silotune.privacy import accounting

        return accounting.calibrate(**asked, extra=extra)
    return _apart.ask("calibrate", extra, **asked)


End = Callable[[], None]


class _Apart:
    """The process, started when it is asked something; what it said is remembered."""

    def __init__(self, start: Callable[[socket.socket], End]) -> None:
        self._start, self._lock = start, threading.Lock()
        self._process: tuple[socket.socket, End] | None = None
        self._timer: threading.Timer | None = None
        self._known: dict[str, float] = {}

    def ask(self, function: str, events: Iterable[DpEvent], **numbers: float) -> float:
        question = json.dumps([function, sorted(to_json(event) for event in events), numbers])
        with self._lock:
            if question not in self._known:
                if len(self._known) >= _MOST_KEPT:
                    self._known.clear()
                self._known[question] = self._told(question)
            return self._known[question]

    def _told(self, question: str) -> float:
        if self._timer is not None:
            self._timer.cancel()
        if self._process is None:
            ours, theirs = socket.socketpair()
            ours.settimeout(_LONGEST)
            with theirs:
                self._process = ours, self._start(theirs)
        connection, _ = self._process
        try:
            connection.sendall(question.encode() + b"\n")
            with connection.makefile() as answers:
                line = answers.readline(_MOST_ANSWER)
        except OSError:
            line = ""
        if not line:
            self._end()
            raise CostsUnknown("the process that computes what events cost came to an end")
        self._timer = threading.Timer(_LINGER, self._rest)
        self._timer.daemon = True
        self._timer.start()
        code, found = json.loads(line)
        if code:
            raise next(kind for kind in catalogue() if kind.code == code)(found)
        return float(found)

    def _rest(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            (connection, end), self._process = self._process, None
            connection.close()
            end()


_apart: _Apart | None = None


def compute_apart(start: Callable[[socket.socket], End]) -> None:
    """From now on, have costs computed by another process.

    Parameters
    ----------
    start : callable
        Starts a process that calls `serve` at its end of a connection; gives what ends it.
    """
    global _apart  # noqa: PLW0603 - a choice of the process, made once at its start
    _apart = _Apart(start)


def serve(connection: socket.socket) -> None:
    """Answer questions, one a line, until there are no more: the other process's work."""
    from silotune.privacy import accounting

    with connection.makefile("rw") as lines:
        for line in iter(lines.readline, ""):
            function, texts, numbers = json.loads(line)
            try:
                events = [from_json(text) for text in texts]
                if function == "calibrate":
                    found = accounting.calibrate(**numbers, extra=events)
                else:
                    found = getattr(accounting, function)(events, **numbers)
                told = ["", found]
            except SilotuneError as exc:
                told = [exc.code, exc.detail]
            lines.write(json.dumps(told) + "\n")
            lines.flush()
