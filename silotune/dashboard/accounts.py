"""Accounts in one file with scrypt hashes of passwords (RFC 7914), sessions, and a brake on guesses."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.dashboard.errors import AccountsInvalid, TooManyAttempts
from silotune.trust.files import replace_file, require_private
from silotune.trust.identity import Person, PersonRole

_COST = {"n": 1 << 15, "r": 8, "p": 1, "maxmem": 64 << 20}  # 32 MiB and some 0.1 s a guess
_LEAST_CHARACTERS, _MOST_CHARACTERS = 12, 200
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class Accounts:
    """Who may sign in with a password.

    Parameters
    ----------
    path : Path
        A JSON file of mode 0600; it is made by the first `add`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._dummy = _hashed("nobody has this password", os.urandom(16))
        self._slow = threading.Lock()  # one guess at a time, however many come

    def add(self, name: str, role: PersonRole, password: str) -> None:
        """Add somebody, or change their role and password. Raises `AccountsInvalid`."""
        if not _NAME.fullmatch(name):
            raise AccountsInvalid(f"{name[:63]!r} is not a usable name")
        if not _LEAST_CHARACTERS <= len(password) <= _MOST_CHARACTERS:
            raise AccountsInvalid(f"a password has {_LEAST_CHARACTERS} to {_MOST_CHARACTERS} signs")
        found = self._read()
        found[name] = {"role": role, "scrypt": _hashed(password, os.urandom(16))}
        replace_file(self._path, json.dumps(found, indent=1).encode())

    def remove(self, name: str) -> bool:
        """Take somebody's account away; whether there was one."""
        found = self._read()
        if found.pop(name, None) is None:
            return False
        replace_file(self._path, json.dumps(found, indent=1).encode())
        return True

    def people(self) -> list[Person]:
        """Everybody with an account, by name."""
        return [Person(name=name, role=row["role"]) for name, row in sorted(self._read().items())]

    def check(self, name: str, password: str) -> Person | None:
        """The person, if the password is right; an unknown name takes as long as a wrong password."""
        row = self._read().get(name)
        stored = str(row["scrypt"]) if row else self._dummy
        with self._slow:
            salt = base64.b64decode(stored.split("$")[0])
            right = hmac.compare_digest(_hashed(password[:_MOST_CHARACTERS], salt), stored)
        return Person(name=name, role=row["role"]) if row and right else None

    def current(self, person: Person) -> bool:
        """Whether somebody who signed in still has that account and role."""
        return person in self.people()

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        require_private(self._path)
        try:
            found = json.loads(self._path.read_bytes())
            if not all(row["role"] in {"viewer", "operator"} for row in found.values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise AccountsInvalid(f"{self._path} is damaged") from exc
        return dict(found)


def _hashed(password: str, salt: bytes) -> str:
    key = hashlib.scrypt(password.encode(), salt=salt, dklen=32, **_COST)
    return f"{base64.b64encode(salt).decode()}${base64.b64encode(key).decode()}"


IDLE_SECONDS, LONGEST_SECONDS = 30 * 60.0, 12 * 3600.0
"""A session ends after so long without a request, and after so long in any case."""

_MOST_SESSIONS = 1000
_FREE_ATTEMPTS, _LONGEST_WAIT = 5, 900.0


@dataclass
class Session:
    """Somebody who is signed in, while they are `valid`; `token` must come with every form."""

    person: Person
    token: str
    began: float
    used: float
    valid: Callable[[], bool]


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

    def begin(self, person: Person, *, valid: Callable[[], bool] = lambda: True) -> str:
        """A new session, over once `valid` says so; the cookie's value, 256 random bits."""
        cookie, now = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            self._found = {k: s for k, s in self._found.items() if self._good(s, now)}
            while len(self._found) >= _MOST_SESSIONS:
                del self._found[next(iter(self._found))]
            token = secrets.token_urlsafe(32)
            self._found[_key(cookie)] = Session(person, token, now, now, valid)
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
        if not found.valid():  # it reads files and the store: not under the lock
            self.end(cookie)
            return None
        return found

    def end(self, cookie: str) -> None:
        """Sign out."""
        with self._lock:
            self._found.pop(_key(cookie), None)

    def _good(self, session: Session, now: float) -> bool:
        return now - session.used < IDLE_SECONDS and now - session.began < LONGEST_SECONDS


class AttemptLimit:
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
