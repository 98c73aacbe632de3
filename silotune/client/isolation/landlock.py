"""Landlock: rules of a process about itself, on files, TCP ports, signals and abstract sockets.

The binding on PyPI (``landlock`` 1.0.0.dev5) is a pre-release that knows files and nothing of ports and
scopes; three system calls do it all. See ``Documentation/userspace-api/landlock.rst`` of the kernel.
Rulesets stack, so each part is one of its own, and an old kernel that lacks one has the others.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from silotune.client.isolation.kernel import call

_CREATE, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_PATH_BENEATH, _NET_PORT = 1, 2

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_MAKE_SOCK = 1 << 9
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
# How many of the rights on files each version knows, from the first.
_KNOWN_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_BIND_TCP, _CONNECT_TCP = 1, 2
_ABSTRACT_SOCKETS, _SIGNALS = 1, 2

READ = _READ_FILE | _READ_DIR
# No links, sockets, pipes or devices: whoever clears the folder up later must meet only plain files.
WRITE = READ | _WRITE_FILE | _TRUNCATE | _REFER | _MAKE_REG | _MAKE_DIR | _REMOVE_FILE | _REMOVE_DIR
MAKE_SOCKET = _MAKE_SOCK
DEVICE = READ | _WRITE_FILE | _IOCTL_DEV

FILES_SINCE, NETWORK_SINCE, SCOPES_SINCE = 1, 4, 6
KERNEL_OF = {1: "5.13", 4: "6.7", 6: "6.12"}


def version() -> int:
    """What the kernel's Landlock can do; 0 if there is none, or it is switched off."""
    try:
        return call("syscall", _CREATE, None, 0, _VERSION)
    except OSError:
        return 0


def _require(since: int) -> int:
    found = version()
    if found == 0:
        raise OSError(errno.ENOSYS, "the kernel has no Landlock, or it is switched off at boot")
    if found < since:
        raise OSError(
            errno.ENOSYS, f"it needs Linux {KERNEL_OF[since]}: Landlock here is version {found}"
        )
    return found


def _ruleset(*, files: int = 0, network: int = 0, scopes: int = 0, known: int) -> int:
    fields = [files, network, scopes][: 1 + (known >= NETWORK_SINCE) + (known >= SCOPES_SINCE)]
    packed = struct.pack(f"={len(fields)}Q", *fields)
    return call(
        "syscall", _CREATE, ctypes.create_string_buffer(packed, len(packed)), len(packed), 0
    )


def _add(ruleset: int, kind: int, packed: bytes) -> None:
    rule = ctypes.create_string_buffer(packed, len(packed))
    call("syscall", _ADD_RULE, ruleset, kind, rule, 0)


def _restrict(ruleset: int) -> None:
    try:
        call("syscall", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def restrict_files(allowed: Iterable[tuple[Path, int]]) -> None:
    """From now on only these paths, and what is below them, can be opened, each with its rights.

    What is not there gets no rule. Nothing may be executed. Raises `OSError`.
    """
    found = _require(FILES_SINCE)
    known = (1 << _KNOWN_RIGHTS.get(found, 16)) - 1
    ruleset = _ruleset(files=known, known=found)
    for path, rights in allowed:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            folder = stat.S_ISDIR(os.fstat(place).st_mode)
            granted = rights & known & (known if folder else _FILE_RIGHTS)
            _add(ruleset, _PATH_BENEATH, struct.pack("=Qi", granted, place))
        finally:
            os.close(place)
    _restrict(ruleset)


def restrict_network(port: int | None) -> None:
    """From now on TCP connections go to this port or nowhere, and none is listened for.

    The kernel's rules know ports and no addresses. Raises `OSError`.
    """
    ruleset = _ruleset(network=_BIND_TCP | _CONNECT_TCP, known=_require(NETWORK_SINCE))
    if port is not None:
        _add(ruleset, _NET_PORT, struct.pack("=QQ", _CONNECT_TCP, port))
    _restrict(ruleset)


def restrict_scopes() -> None:
    """No signal to, and no abstract socket of, a process that isn't confined with this one."""
    _restrict(_ruleset(scopes=_ABSTRACT_SOCKETS | _SIGNALS, known=_require(SCOPES_SINCE)))
