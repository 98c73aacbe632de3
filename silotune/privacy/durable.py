"""Private files that survive a crash: written whole, to the disk, or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from silotune.errors import FileExposed

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def require_private(path: Path) -> None:
    """Refuse a file that other accounts may touch.

    Raises
    ------
    FileExposed
        The group or the world has any permission on it.
    FileNotFoundError
        There is no such file.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _OTHERS:
        raise FileExposed(f"{path} has mode {mode:04o}; it must be 0600")


def sync_directory(folder: Path) -> None:
    """Make creations, renames and removals in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_private_folder(folder: Path) -> None:
    """Make `folder`, and parents that are missing, for its owner only."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        sync_directory(path.parent)


def replace_file(path: Path, content: bytes, *, mode: int = 0o600, to_disk: bool = True) -> None:
    """Put `content` at `path`: after a crash it holds the old bytes or the new, never a mixture.

    The temporary file has a fixed name, so that crashes leave no litter: callers see to it that a
    path has one writer at a time. Without `to_disk` that holds for the end of any process, but not
    for a power cut.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    _write(temporary, content, os.O_TRUNC, mode, to_disk=to_disk)
    temporary.replace(path)
    if to_disk:
        sync_directory(path.parent)


def create_file(path: Path, content: bytes, *, mode: int = 0o600) -> bool:
    """Like `replace_file`, but leave a file that is there alone, with any number of writers.

    Returns
    -------
    bool
        Whether the file is the one of this call.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    _write(temporary, content, os.O_EXCL, mode)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_directory(path.parent)
    return True


def _write(path: Path, content: bytes, flag: int, mode: int, *, to_disk: bool = True) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        if to_disk:
            os.fsync(file.fileno())
