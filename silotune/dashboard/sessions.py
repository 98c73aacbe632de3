"""Sessions in memory, and the brake on guessing."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from silotune.dashboard.errors import TooManyAttempts
from silotune.federation.person import Person

IDLE_SECONDS, LONGEST_SECONDS = 30 * 60.0, 12 * 3600.0
"""A session ends after so long without a request, and after so long in any case."""

_MOST_SESSIONS = 1000
_FREE_ATTEMPTS, _LONGEST_WAIT = 5, 900.0


@dataclass
class Session:
    """Somebody who is signed in; `token` must come with every form."""

    person: Person
    token: str
    began: float
    used: float


class Sessions:
    """Sessions by the hash of their cookie, so that memory holds no cookie that would open one.

    Parameters
    ----------
    clock : callable
        Seconds, growing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._found: dict[str, Session] = {}

    def begin(self, person: Person) -> str:
        """A new session; the cookie's value, 256 random bits."""
        cookie, now = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            self._drop_old(now)
            while len(self._found) >= _MOST_SESSIONS:
                del self._found[next(iter(self._found))]
            self._found[_key(cookie)] = Session(person, secrets.token_urlsafe(32), now, now)
        return cookie

    def find(self, cookie: str, *, touch: bool = True) -> Session | None:
        """The session of a cookie if it is not over; `touch` makes it last longer."""
        now = self._clock()
        with self._lock:
            found = self._found.get(_key(cookie))
            if found is None or not self._good(found, now):
                return None
            if touch:
                found.used = now
            return found

    def end(self, cookie: str) -> None:
        """Sign out."""
        with self._lock:
            self._found.pop(_key(cookie), None)

    def _good(self, session: Session, now: float) -> bool:
        return now - session.used < IDLE_SECONDS and now - session.began < LONGEST_SECONDS

    def _drop_old(self, now: float) -> None:
        self._found = {k: s for k, s in self._found.items() if self._good(s, now)}


class Brake:
    """Makes guessing slow: after five failures, each further one doubles the wait, to 15 minutes.

    Failures count for the account and for the address, so that neither one account can be tried from
    many addresses nor many accounts from one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._failures: dict[str, tuple[int, float]] = {}

    def require_open(self, *keys: str) -> None:
        """Raise `TooManyAttempts` while one of the keys has to wait."""
        wait = max(self._wait(key) for key in keys)
        if wait > 0:
            raise TooManyAttempts(f"the next attempt is possible in {wait:.0f} seconds")

    def failed(self, *keys: str) -> None:
        """Note a failure for each key."""
        now = self._clock()
        with self._lock:
            for key in keys:
                count, _ = self._failures.get(key, (0, now))
                self._failures[key] = (count + 1, now)
            if len(self._failures) > 10_000:
                old = now - 2 * _LONGEST_WAIT
                self._failures = {k: v for k, v in self._failures.items() if v[1] > old}

    def succeeded(self, *keys: str) -> None:
        """Forget the failures of each key."""
        with self._lock:
            for key in keys:
                self._failures.pop(key, None)

    def _wait(self, key: str) -> float:
        with self._lock:
            count, last = self._failures.get(key, (0, 0.0))
        if count < _FREE_ATTEMPTS:
            return 0.0
        pause = min(2.0 ** (count - _FREE_ATTEMPTS + 1), _LONGEST_WAIT)
        return last + pause - self._clock()


def _key(cookie: str) -> str:
    return hashlib.sha256(cookie.encode()).hexdigest()
