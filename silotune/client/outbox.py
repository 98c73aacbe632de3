"""The outbox: stored replies, so that a reply asked for again is the same bytes again."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from silotune.federation.errors import SealBroken
from silotune.federation.sealed import Vault
from silotune.privacy.durable import create_private_folder, replace_file, require_private
from silotune.privacy.ledger import ReleaseKey

_KEPT_ROUNDS = 3
_KEPT_SECONDS = 30 * 24 * 3600.0


class Outbox:
    """A folder of replies, one private file each, named by run, round, release and content.

    A file is complete and on the disk, or not there. That a file *is* there means nothing yet: what
    was released is for the caller to say (the ledger knows the SHA-256 it charged).

    Parameters
    ----------
    folder : Path
        In the site's state; made if missing.
    run : str
        The run that writes. Files of other runs are removed when they are a month old.
    vault : Vault or None
        Seals the files; without one they are written as they are.
    to_disk : bool
        Force files to the disk; False in simulations only.
    """

    def __init__(
        self, folder: Path, *, run: str, vault: Vault | None = None, to_disk: bool = True
    ) -> None:
        self._folder, self._vault, self._to_disk = folder, vault, to_disk
        # The id comes from the coordinator: its digest is a safe file name, it may not be.
        self._prefix = hashlib.sha256(run.encode()).hexdigest()[:16]
        create_private_folder(folder)
        self._remove_old_runs()

    def store(self, key: ReleaseKey, payload: bytes) -> str:
        """Write a reply to the disk; returns its SHA-256, in hex."""
        digest = hashlib.sha256(payload).hexdigest()
        path = self._path(key, digest)
        content = self._vault.seal(payload, name=path.name) if self._vault else payload
        replace_file(path, content, to_disk=self._to_disk)
        return digest

    def load(self, key: ReleaseKey, digest: str) -> bytes | None:
        """The stored reply with this SHA-256, or None if it is gone or damaged.

        Raises
        ------
        FileExposed
            Other accounts of the machine may read or write it.
        """
        path = self._path(key, digest)
        if not path.exists():
            return None
        require_private(path)
        payload = path.read_bytes()
        if self._vault:
            try:
                payload = self._vault.unseal(payload, name=path.name)
            except SealBroken:
                return None
        return payload if hashlib.sha256(payload).hexdigest() == digest else None

    def discard(self, key: ReleaseKey, digest: str) -> None:
        """Remove a reply that was not released after all."""
        self._path(key, digest).unlink(missing_ok=True)

    def stored(self, key: ReleaseKey) -> list[str]:
        """SHA-256 of every reply stored under `key`."""
        return sorted(
            path.stem.rpartition("-")[2] for path in self._folder.glob(f"{self._stem(key)}-*")
        )

    def prune(self, *, newest_round: int) -> None:
        """Remove this run's replies that are more than a few rounds old."""
        for path in self._folder.glob(f"{self._prefix}-*.safetensors"):
            if int(path.name.split("-")[1]) < newest_round - _KEPT_ROUNDS:
                path.unlink(missing_ok=True)

    def _stem(self, key: ReleaseKey) -> str:
        return f"{self._prefix}-{key.round:08d}-{key.release}"

    def _path(self, key: ReleaseKey, digest: str) -> Path:
        return self._folder / f"{self._stem(key)}-{digest}.safetensors"

    def _remove_old_runs(self) -> None:
        oldest = time.time() - _KEPT_SECONDS
        for path in self._folder.iterdir():
            if not path.name.startswith(self._prefix) and path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)
