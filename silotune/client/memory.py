"""What a site remembers from one round of a run to the next, and nobody else ever sees.

Personal parts of an adapter and control variates are made of private records. A deployed site keeps
them sealed on its own disk. Two rounds are kept: a round that is asked for again after a crash starts
from what the site remembered before it, as it did the first time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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

    Parameters
    ----------
    folder : Path
        In the site's state.
    run : str
        The run's name; its digest is the files' prefix.
    sealer : Sealer
        Encrypts at rest.
    """

    def __init__(self, folder: Path, *, run: str, sealer: Sealer) -> None:
        self._folder, self._sealer = folder, sealer
        self._prefix = hashlib.sha256(run.encode()).hexdigest()[:16]

    def recall(self, *, before: int) -> tuple[int, Arrays] | None:
        """The newest round before one."""
        rounds = [n for n in self._rounds() if n < before]
        if not rounds:
            return None
        return rounds[-1], load(self._sealer.read(self._path(rounds[-1])))

    def keep(self, server_round: int, arrays: Arrays) -> None:
        """Write the file of a round, then remove those of older rounds."""
        content = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self._sealer.write(self._path(server_round), save(content))
        for old in self._rounds()[:-_KEPT_ROUNDS]:
            self._path(old).unlink(missing_ok=True)

    def _rounds(self) -> list[int]:
        names = (path.stem for path in self._folder.glob(f"{self._prefix}-*.sealed"))
        return sorted(int(name.removeprefix(f"{self._prefix}-")) for name in names)

    def _path(self, server_round: int) -> Path:
        return self._folder / f"{self._prefix}-{server_round:06d}.sealed"
