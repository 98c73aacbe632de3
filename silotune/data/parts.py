"""The files of a source: parts of a folder, unpacked as they are read.

A folder is read as Spark and pandas write one: every file in it, in the order of names; those that
begin with ``.`` or ``_`` (``_SUCCESS``, checksums) are no records, and a folder ``year=2026`` gives a
column of that name. A file that is packed by gzip or zstd is known by its first bytes, and unpacked
while it is read, never onto the disk.

A packed file may unpack to `MOST_UNPACKED` times its size (`ALWAYS_UNPACKED` bytes are always allowed):
text packs to a tenth, and a file of a megabyte that unpacks to a terabyte was made to stop the machine.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import unquote

from silotune.errors import DatasetUnreadable

MOST_UNPACKED = 200
ALWAYS_UNPACKED = 64 * 2**20

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BUFFER = 2**20

# What Hive and Spark write for a missing value in a folder's name.
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def parts_of(path: Path) -> list[Path]:
    """The files that `path` stands for: itself, or those of the folder and the folders in it.

    Raises
    ------
    DatasetUnreadable
        A folder without any.
    """
    if not path.is_dir():
        return [path]
    found = sorted(
        part
        for part in path.rglob("*")
        if part.is_file() and not any(n[0] in "._" for n in part.relative_to(path).parts)
    )
    if not found:
        raise DatasetUnreadable(f"{path} is a folder without a file of records")
    return found


def partition_values(part: Path, folder: Path) -> dict[str, str]:
    """Columns that the names of folders between `folder` and a part give: ``year=2026``."""
    if part == folder:
        return {}
    pairs = (name.split("=", 1) for name in part.relative_to(folder).parts[:-1] if "=" in name)
    return {key: "" if value == _NO_PARTITION else unquote(value) for key, value in pairs}


def most_unpacked(packed: int) -> int:
    """Bytes that a packed file of so many bytes may unpack to."""
    return max(ALWAYS_UNPACKED, MOST_UNPACKED * packed)


def unpacks_too_far(path: Path, limit: int) -> DatasetUnreadable:
    """The refusal of a file that unpacks to more than `limit` bytes."""
    return DatasetUnreadable(
        f"{path} unpacks to more than {limit:,} bytes, {MOST_UNPACKED} times its size",
        remedy="If it is right, write its records unpacked, and name that file in site.toml.",
    )


class _Unpacking(io.RawIOBase):
    """An unpacking stream that ends with an error where it has given too much."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._limit = self._left = most_unpacked(path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with told(self._path):
            content = self._stream.read(len(buffer))
        self._left -= len(content)
        if self._left < 0:
            raise unpacks_too_far(self._path, self._limit)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Tell of the system's and the unpackers' errors by file, without what they quote of it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else None
        other = exc.filename if isinstance(exc, OSError) else None
        at = f"{path}: {other}" if other not in (None, str(path)) else path
        raise DatasetUnreadable(f"{at}: {reason or 'it is damaged'}") from None


def open_part(path: Path) -> BinaryIO:
    """One file of records, unpacked while it is read if gzip or zstd packed it.

    Raises
    ------
    DatasetUnreadable
        It can't be opened; while it is read, that it is damaged or unpacks beyond all bounds.
    """
    with told(path):
        with path.open("rb") as file:
            start = file.read(len(_ZSTD))
        if start.startswith(_GZIP):
            return _bounded(cast("BinaryIO", gzip.open(path)), path)
        if start == _ZSTD:
            import pyarrow as pa

            return _bounded(cast("BinaryIO", pa.input_stream(str(path), compression="zstd")), path)
        return path.open("rb", buffering=_BUFFER)


def _bounded(stream: BinaryIO, path: Path) -> BinaryIO:
    return io.BufferedReader(_Unpacking(stream, path), _BUFFER)
