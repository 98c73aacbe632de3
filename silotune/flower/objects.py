"""Flower's objects, the parts of messages under way, as sealed files instead of rows.

Flower's own store asks a database some ten times for each object, the most expensive part of a round
without training, and leaves updates on the disk in clear. Here what hangs together is kept in memory
and contents are files, so that after a crash everything that had arrived is still there. It follows
`flwr.supercore.object_store.SqlObjectStore`: objects are named by the SHA-256 of their content, are
announced before they are stored, children first, and go when nothing names them any more.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_object_head_values_from_object_content,
    get_object_id,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStore

from silotune.errors import SilotuneError
from silotune.trust.files import create_private_folder, replace_file

_log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{64}")


class Seals(Protocol):
    """What seals files: `silotune.trust.vault.Vault`."""

    def seal(self, content: bytes, *, name: str) -> bytes:
        """Encrypt under a name."""
        ...

    def unseal(self, sealed: bytes, *, name: str) -> bytes:
        """Decrypt; raises `SilotuneError` for anything else than what `seal` made."""
        ...


@dataclass
class _Entry:
    """An object: the run it was first announced for, what it names, and how many name it."""

    run: int
    children: tuple[str, ...]
    parents: int = 0
    available: bool = False
    runs: set[int] = field(default_factory=set)


class ObjectFiles(ObjectStore):
    """Objects in a folder, which has one process at a time; safe for many threads.

    Files are whole or not there once the process is killed. They are not synced: after a power cut one
    may be torn, which its seal shows, and it is asked for again.

    Parameters
    ----------
    folder : Path
        Made if missing. What it holds of an earlier process is taken over, unless it is incomplete.
    vault : Vault
        Seals the files.
    """

    def __init__(self, folder: Path, vault: Seals) -> None:
        self._folder, self._vault = folder, vault
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.RLock()
        create_private_folder(folder)
        self._take_over()

    # --- Flower's interface ---

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Announce objects; returns the ids of those whose content is still missing.

        Raises
        ------
        ValueError
            An id is no SHA-256, or an object is known to name others.
        """
        parts = [
            (part.object_id, tuple(child.object_id for child in part.children))
            for part in iterate_object_tree(object_tree)
        ]
        for object_id, children in parts:
            if not _ID.fullmatch(object_id) or len(children) != len(set(children)):
                raise ValueError(f"Invalid object ID format or children: {object_id}")
        missing = []
        with self._lock:
            for object_id, children in parts:
                entry = self._entries.get(object_id)
                if entry is None:
                    entry = self._entries[object_id] = _Entry(run_id, children)
                    for child in children:
                        self._entries[child].parents += 1
                elif set(entry.children) != set(children):
                    raise ValueError(f"Object {object_id} was announced with other children")
                entry.runs.add(run_id)
                if not entry.available:
                    missing.append(object_id)
        return missing

    def get_object_tree(self, object_id: str) -> ObjectTree:
        """An object and all below it, by their ids. Raises `NoObjectInStoreError`."""
        with self._lock:
            entry = self._require(object_id)
            trees = [self.get_object_tree(child) for child in entry.children]
        return ObjectTree(object_id=object_id, children=trees)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Store the content of an announced object.

        Raises
        ------
        ValueError
            It is not the content that has this id.
        NoObjectInStoreError
            The object was not announced, or is withdrawn.
        """
        if get_object_id(object_content) != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        validate_object_content(content=object_content)
        with self._lock:
            entry = self._require(object_id)
            if entry.available:
                return
        sealed = self._vault.seal(object_content, name=object_id)
        with self._lock:
            entry = self._require(object_id)
            replace_file(self._path(object_id, entry), sealed, to_disk=False)
            entry.available = True

    def get(self, object_id: str) -> bytes | None:
        """The content; empty while it is missing, None if the object is unknown."""
        with self._lock:
            entry = self._entries.get(object_id)
            if entry is None:
                return None
            if not entry.available:
                return b""
            sealed = self._path(object_id, entry).read_bytes()
        return self._vault.unseal(sealed, name=object_id)

    def delete(self, object_id: str) -> None:
        """Remove an object that no other names, and whatever only it named."""
        with self._lock:
            entry = self._entries.get(object_id)
            if entry is None or entry.parents:
                return
            del self._entries[object_id]
            self._path(object_id, entry).unlink(missing_ok=True)
            for child in entry.children:
                self._entries[child].parents -= 1
                self.delete(child)

    def delete_objects_in_run(self, run_id: int) -> None:
        """Remove everything of a run that no other run's objects name."""
        with self._lock:
            for object_id in [o for o, entry in self._entries.items() if run_id in entry.runs]:
                self.delete(object_id)
            for entry in self._entries.values():
                entry.runs.discard(run_id)

    def retain(self, messages: Collection[str]) -> None:
        """Remove what is part of none of these messages: left by a process that ended half-way."""
        with self._lock:
            for object_id in [o for o, entry in self._entries.items() if not entry.parents]:
                if object_id not in messages:
                    self.delete(object_id)

    def clear(self) -> None:
        """Remove everything."""
        with self._lock:
            for object_id, entry in self._entries.items():
                self._path(object_id, entry).unlink(missing_ok=True)
            self._entries.clear()

    def __contains__(self, object_id: object) -> bool:
        """Whether an object is known, with its content or without."""
        with self._lock:
            return object_id in self._entries

    def __len__(self) -> int:
        """How many objects are known."""
        with self._lock:
            return len(self._entries)

    # --- files ---

    def _require(self, object_id: str) -> _Entry:
        if (entry := self._entries.get(object_id)) is None:
            raise NoObjectInStoreError(f"Object {object_id} was not pre-registered.")
        return entry

    def _path(self, object_id: str, entry: _Entry) -> Path:
        return self._folder / f"{entry.run:x}-{object_id}"

    def _take_over(self) -> None:
        """Find again what an earlier process had stored, without what it hangs on being lost."""
        found: dict[str, _Entry] = {}
        for path in self._folder.iterdir():
            run, _, object_id = path.name.partition("-")
            try:
                content = self._vault.unseal(path.read_bytes(), name=object_id)
                _, children, _ = get_object_head_values_from_object_content(content)
                number = int(run, 16)
                found[object_id] = _Entry(number, tuple(children), available=True, runs={number})
            except (SilotuneError, ValueError):
                _log.info("an object under way was cut off by a crash: it is asked for again")
                path.unlink()
        while lost := [o for o, e in found.items() if not found.keys() >= set(e.children)]:
            for object_id in lost:
                self._path(object_id, found.pop(object_id)).unlink()
        for entry in found.values():
            for child in entry.children:
                found[child].parents += 1
        self._entries = found
