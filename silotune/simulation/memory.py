"""One setting of the C library's allocator that message passing depends on."""

from __future__ import annotations

import contextlib
import ctypes

# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 1 << 25  # a larger value is refused
_KEPT_BYTES = 1 << 28


def keep_freed_memory() -> None:
    """Have glibc keep up to 256 MiB of freed memory instead of returning it at once.

    Adapters and activations of a megabyte and more come and go all the time. By default their pages
    go back to the kernel, which has to clear them again for the next message: a third of the cost of
    a message on a virtual machine. Does nothing where the C library has no such setting.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
