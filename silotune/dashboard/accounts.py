"""Accounts with passwords, in one file: scrypt hashes (RFC 7914), never a password."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from silotune.dashboard.errors import AccountsInvalid
from silotune.federation.person import Person, PersonRole
from silotune.privacy.durable import replace_file, require_private

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

    def remove(self, name: str) -> None:
        """Take somebody's account away. Raises `AccountsInvalid` if there is none."""
        found = self._read()
        if found.pop(name, None) is None:
            raise AccountsInvalid(f"there is no account {name[:63]!r}")
        replace_file(self._path, json.dumps(found, indent=1).encode())

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
