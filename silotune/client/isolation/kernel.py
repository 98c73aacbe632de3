"""The few calls to Linux that Python has no function for."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 4, 38, 39
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_CAPABILITY_VERSION_3 = 0x20080522


def call(name: str, *arguments: int | ctypes.Array[ctypes.c_char] | None) -> int:
    """Call a function of the C library. Raises `OSError` with its errno."""
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = int(getattr(_LIBC, name)(*passed))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def set_no_new_privileges() -> None:
    """From now on no program that is started has more rights than this process; for good."""
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if call("prctl", _PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1:
        raise OSError(0, "the kernel took the call and did nothing")


def hide_memory() -> None:
    """No other process of this account may read this one's memory, and no crash writes it to disk.

    A limit on core files of zero is not enough: the kernel ignores it where a program, such as
    systemd-coredump, collects them.
    """
    if sys.platform == "linux":
        call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def go_first() -> None:
    """Where memory runs out, the kernel ends this process before others, if it may be told so."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def drop_capabilities() -> None:
    """Give up all rights of root, so that only those of the account are left."""
    header = ctypes.create_string_buffer(_CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4), 8)
    call("capset", header, ctypes.create_string_buffer(24))
    held = ctypes.create_string_buffer(24)
    call("capget", header, held)
    if any(held.raw):
        raise OSError(0, "some are still held")


def namespace(kind: str) -> str:
    """Which namespace of a kind (user, net, ipc) this process is in."""
    return str(Path(f"/proc/self/ns/{kind}").readlink())


def enter_namespaces(flags: int) -> None:
    """Move this process into fresh namespaces; in a user namespace it keeps its own ids."""
    user, group = os.getuid(), os.getgid()
    call("unshare", flags)
    if flags & CLONE_NEWUSER:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")


def raise_loopback() -> None:
    """Switch on the one interface of a fresh network namespace."""
    with socket.socket(type=socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("=16sH14x", b"lo", _IFF_UP))


def threads() -> int:
    """How many threads this process has."""
    return len(list(Path("/proc/self/task").iterdir()))
