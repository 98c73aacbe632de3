"""What a site remembers from one round of a run to the next, and nobody else ever sees.

Personal parts of an adapter and control variates are made of private records. A deployed site keeps
them sealed on its own disk. Two rounds are kept: a round that is asked for again after a crash starts
from what the site remembered before it, as it did the first time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

Arrays = Mapping[str, NDArray[Any]]

_KEPT_ROUNDS = 2


class Sealer(Protocol):
    """Writes and reads private files, as `silotune.federation.sealed.Vault` does."""

    def write(self, path: Path, content: bytes) -> None:
        """Put content at a path, whole or not at all."""
        ...

    def read(self, path: Path) -> bytes:
        """Content of a file."""
        ...


class Memory(Protocol):
    """Arrays by round."""

    def recall(self, *, before: int) -> tuple[int, Arrays] | None:
        """What was kept in the newest round before one, and which round that was."""
        ...

    def keep(self, server_round: int, arrays: Arrays) -> None:
        """Keep what a round ended with; older rounds may be forgotten."""
        ...


class ProcessMemory:
    """Kept in this process: for comparison models, which nobody resumes."""

    def __init__(self) -> None:
        self._rounds: dict[int, Arrays] = {}

    def recall(self, *, before: int) -> tuple[int, Arrays] | None:
        """The newest round before one."""
        newest = max((n for n in self._rounds if n < before), default=None)
        return None if newest is None else (newest, self._rounds[newest])

    def keep(self, server_round: int, arrays: Arrays) -> None:
        """Keep copies."""
        self._rounds[server_round] = {name: array.copy() for name, array in arrays.items()}
        for old in sorted(self._rounds)[:-_KEPT_ROUNDS]:
            del self._rounds[old]


class SealedMemory:
    """Sealed files in a site's state folder, one a round.

    What a round ends with is kept in the process until the round's update is released. It is then
    written under the name of that very update, and read only if the update is known as released: one
    commit makes both count, and what a round that came to nothing left behind is never seen.

    Parameters
    ----------
    folder : Path
        In the site's state.
    run : str
        The run's name; its digest is the files' prefix.
    sealer : Sealer
        Encrypts at rest.
    released : callable
        SHA-256 of the update that was released in a round, or None.
    """

    def __init__(
        self, folder: Path, *, run: str, sealer: Sealer, released: Callable[[int], str | None]
    ) -> None:
        self._folder, self._sealer, self._released = folder, sealer, released
        self._prefix = hashlib.sha256(run.encode()).hexdigest()[:16]
        self._staged: dict[int, bytes] = {}

    def recall(self, *, before: int) -> tuple[int, Arrays] | None:
        """The newest released round before one."""
        for number in sorted({n for n, _ in self._files() if n < before}, reverse=True):
            digest = self._released(number)
            if digest is not None and (path := self._path(number, digest)).exists():
                return number, load(self._sealer.read(path))
        return None

    def keep(self, server_round: int, arrays: Arrays) -> None:
        """Keep what a round ended with until it is released, see `promote`."""
        content = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self._staged = {server_round: bytes(save(content))}

    def promote(self, server_round: int, digest: str) -> None:
        """Write what a round ended with, as that of the update about to be released."""
        content = self._staged.pop(server_round, None)
        if content is None:
            return
        self._sealer.write(self._path(server_round, digest), content)
        files = self._files()
        kept = sorted({number for number, _ in files})[-_KEPT_ROUNDS:]
        for number, name in files:
            stale = number == server_round and name != self._path(server_round, digest).name
            if number not in kept or stale:
                (self._folder / name).unlink(missing_ok=True)

    def _files(self) -> list[tuple[int, str]]:
        found = self._folder.glob(f"{self._prefix}-*-*.sealed")
        return [(int(path.name.split("-")[1]), path.name) for path in found]

    def _path(self, server_round: int, digest: str) -> Path:
        return self._folder / f"{self._prefix}-{server_round:06d}-{digest[:32]}.sealed"
