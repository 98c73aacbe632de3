"""Private files that survive a crash: written whole, to the disk, or not at all."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from silotune.errors import FileExposed

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def require_private(path: Path) -> None:
    """Refuse a file or folder that other accounts may touch, or that lies elsewhere.

    Raises
    ------
    FileExposed
        The group or the world has any permission on it, it is another account's, or a link.
    FileNotFoundError
        There is no such file.
    """
    found = path.lstat()
    _require_own(path, found)
    mode = stat.S_IMODE(found.st_mode)
    if mode & _OTHERS:
        wanted = "0700" if stat.S_ISDIR(found.st_mode) else "0600"
        raise FileExposed(f"{path} has mode {mode:04o}; it must be {wanted}")


def require_private_tree(folder: Path) -> None:
    """Refuse a folder that other accounts may enter, or that holds a link or what is not ours.

    What is in a folder of mode 0700 can't be reached by others, whatever its own mode: a link leads
    out of it.

    Raises
    ------
    FileExposed
        It is so.
    FileNotFoundError
        There is no such folder.
    """
    require_private(folder)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            try:
                _require_own(path, path.lstat())
            except FileNotFoundError:
                continue  # a temporary file of somebody who writes


def require_unwritable(path: Path) -> None:
    """Refuse a file that other accounts may write, or replace in its folder; links are followed.

    Raises
    ------
    FileExposed
        Others than its owner and root may.
    FileNotFoundError
        There is no such file.
    """
    real = path.resolve(strict=True)
    for place in (real, real.parent):
        found = place.stat()
        mode = stat.S_IMODE(found.st_mode)
        shared = stat.S_ISDIR(found.st_mode) and mode & stat.S_ISVTX  # nobody may replace another's
        if mode & _OTHERS_WRITE and not shared:
            raise FileExposed(
                f"{place} has mode {mode:04o}: other accounts may change what this one obeys",
                remedy=f"Look at what it says, then `chmod go-w {place}`.",
            )
        if found.st_uid not in {os.geteuid(), 0} and os.geteuid() and not shared:
            raise FileExposed(f"{place} belongs to another account, which may change it")


def _require_own(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise FileExposed(
            f"{path} is a link; what is private must lie where it is looked for",
            remedy="Find out who made the link, then put the file or folder itself there.",
        )
    if found.st_uid != os.geteuid() and os.geteuid():  # root may look after another account's
        raise FileExposed(f"{path} belongs to another account")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; its content is never all in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(folder: Path) -> None:
    """Make creations, renames and removals in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """A Unix socket's address: short, however long its path is (the kernel takes 107 bytes)."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def create_private_folder(folder: Path, *, to_disk: bool = True) -> None:
    """Make `folder`, and parents that are missing, for its owner only."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        if to_disk:
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


def create_file(path: Path, content: bytes, *, mode: int = 0o600, to_disk: bool = True) -> bool:
    """Like `replace_file`, but leave a file that is there alone, with any number of writers.

    Returns
    -------
    bool
        Whether the file is the one of this call.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    _write(temporary, content, os.O_EXCL, mode, to_disk=to_disk)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    if to_disk:
        sync_directory(path.parent)
    return True


def _write(path: Path, content: bytes, flag: int, mode: int, *, to_disk: bool = True) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        if to_disk:
            os.fsync(file.fileno())
