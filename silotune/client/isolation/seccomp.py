"""A seccomp filter: the list of what the process may ask the kernel; everything else is refused.

It is a list of what is allowed, so that what a later kernel adds is refused until somebody has looked at
it. The program is assembled here, in some forty lines, because the binding on PyPI (``pyseccomp`` 0.1.2
of 2021) needs libseccomp on the host and fails without it; the tests compare the numbers with that
library's. A refused call fails with EPERM, as it would without the rights to it, so that libraries go
their usual ways round. See ``Documentation/userspace-api/seccomp_filter.rst`` of the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from silotune.client.isolation.kernel import call


def _table(text: str) -> dict[str, tuple[int | None, ...]]:
    """Numbers by name: on x86_64 and on aarch64, None where there is no such call."""
    rows = (entry.split() for entry in text.split(",") if entry.strip())
    return {name: tuple(None if n == "-" else int(n) for n in own) for name, *own in rows}


# Files (Landlock says which), memory, threads, clocks, waiting, and what was inherited.
# Not there, among others: programs, namespaces, mounts, other processes' memory, modes, owners and times
# of files, links, shared memory, keys, modules, BPF, io_uring, performance counters.
ALWAYS = _table(
    """
    read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69,
    pwritev 296 70, preadv2 327 286, pwritev2 328 287, lseek 8 62, open 2 -, openat 257 56,
    openat2 437 437, creat 85 -, close 3 57, close_range 436 436, stat 4 -, fstat 5 80, lstat 6 -,
    newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48,
    faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents 78 -, getdents64 217 61,
    getcwd 79 17, chdir 80 49, fchdir 81 50, umask 95 166, mkdir 83 -, mkdirat 258 34, rmdir 84 -,
    unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, truncate 76 45,
    ftruncate 77 46, fallocate 285 47, fadvise64 221 223, readahead 187 213, fsync 74 82,
    fdatasync 75 83, sync_file_range 277 84, flock 73 32, sendfile 40 71, copy_file_range 326 285,
    dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, select 23 -, pselect6 270 72,
    poll 7 -, ppoll 271 73, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21,
    epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, eventfd 284 -, eventfd2 290 19,
    signalfd4 289 74, timerfd_create 283 85, timerfd_settime 286 86, timerfd_gettime 287 87,
    munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, brk 12 214, msync 26 227,
    mincore 27 232, mlock 149 228, mlock2 325 284, munlock 150 229, mlockall 151 230,
    munlockall 152 231, membarrier 324 283, get_mempolicy 239 236, set_mempolicy 238 237,
    mbind 237 235, set_mempolicy_home_node 450 450, pkey_alloc 330 289, pkey_free 331 290,
    pkey_mprotect 329 288, futex 202 98, futex_waitv 449 449, futex_wait 455 455,
    futex_wake 454 454, futex_requeue 456 456, set_robust_list 273 99, get_robust_list 274 100,
    set_tid_address 218 96, rseq 334 293, exit 60 93, exit_group 231 94, wait4 61 260,
    waitid 247 95, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
    rt_sigpending 127 136, rt_sigsuspend 130 133, rt_sigtimedwait 128 137, sigaltstack 131 132,
    restart_syscall 219 128, pause 34 -, getpid 39 172, gettid 186 178, getppid 110 173,
    getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148,
    getresgid 120 150, getgroups 115 158, getpgrp 111 -, getpgid 121 155, getsid 124 156,
    uname 63 160, sysinfo 99 179, times 100 153, getrusage 98 165, getrlimit 97 163,
    setrlimit 160 164, sched_yield 24 124, sched_getaffinity 204 123, sched_getparam 143 121,
    sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126,
    sched_getattr 315 275, sched_rr_get_interval 148 127, getcpu 309 168, time 201 -,
    gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
    nanosleep 35 101, alarm 37 -, getitimer 36 102, setitimer 38 103, timer_create 222 107,
    timer_settime 223 110, timer_gettime 224 108, timer_getoverrun 225 109, timer_delete 226 111,
    getrandom 318 278, arch_prctl 158 -, capget 125 90, recvfrom 45 207, recvmsg 47 212,
    recvmmsg 299 243, shutdown 48 210, getsockname 51 204, getpeername 52 205, getsockopt 55 209,
    setsockopt 54 208,
    """
)
# Those whose arguments decide, or that only some processes may use.
CHECKED = _table(
    """
    clone 56 220, mmap 9 222, prctl 157 167, ioctl 16 29, fcntl 72 25, kill 62 129, tgkill 234 131,
    prlimit64 302 261, sched_setaffinity 203 122, sendto 44 206, sendmsg 46 211, sendmmsg 307 269,
    socket 41 198, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242,
    clone3 435 435, memfd_create 319 279,
    """
)
_NEWEST = 462  # mseal; about a newer call nothing is known here, and it is said to be missing

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000

_OF_SERVERS = ("connect", "bind", "listen", "accept", "accept4", "sendmsg", "sendmmsg")
_ALL_BITS = 0xFFFFFFFF
_NEW_NAMESPACES, _THREAD = 0x7E020000, 0x00010000
# MAP_SHARED with MAP_ANONYMOUS, and MAP_GROWSDOWN: the limit on private memory doesn't count them.
_SHARED_NAMELESS, _STACK = 0x21, 0x100
_FAST_OPEN = 0x20000000  # connects past Landlock's rule for connections
# By these a process has the kernel send a signal to another, or types into a terminal.
_OWNER_IOCTLS = {0x5412, 0x541C, 0x5423, 0x8901, 0x8902}
_FCNTLS = {
    fcntl.F_DUPFD, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_GETLK,
    fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_DUPFD_CLOEXEC, 36, 37, 38, 1031, 1032, 1033, 1034,
}  # fmt: skip
# Names of threads and of memory, huge pages, vector lengths, and questions about oneself.
_PRCTLS = {3, 15, 16, 21, 23, 30, 39, 41, 42, 50, 51, 56, 0x53564D41}


@dataclass(frozen=True, kw_only=True)
class ArgumentRule:
    """Half of an argument (from 0), masked, is among `values`, or with `excluded` is none of them."""

    argument: int
    upper: bool = False
    values: frozenset[int]
    mask: int = _ALL_BITS
    excluded: bool = False


def _one_of(argument: int, *values: int, mask: int = _ALL_BITS) -> ArgumentRule:
    return ArgumentRule(argument=argument, values=frozenset(values), mask=mask)


def _none_of(argument: int, *values: int, mask: int = _ALL_BITS) -> ArgumentRule:
    return ArgumentRule(argument=argument, values=frozenset(values), mask=mask, excluded=True)


def _conditions(
    *, pid: int, reaches: bool, loopback: bool, gpu: bool
) -> Mapping[str, tuple[ArgumentRule, ...]]:
    """Under which conditions, all of which must hold, each of `CHECKED` is allowed."""
    own = _one_of(0, pid)
    found: dict[str, tuple[ArgumentRule, ...]] = {
        "clone": (_one_of(0, _THREAD, mask=_THREAD | _NEW_NAMESPACES),),
        "prctl": (_one_of(0, *_PRCTLS),),
        "ioctl": (_none_of(1, *_OWNER_IOCTLS),),
        "fcntl": (_one_of(1, *_FCNTLS),),
        "kill": (own,),
        "tgkill": (own,),
        "prlimit64": (_one_of(0, 0, pid),),
        "sched_setaffinity": (_one_of(0, 0, pid),),
        # To the other end only: no address, and by sendmsg nothing, whose addresses a filter can't see.
        "sendto": (
            _one_of(4, 0),
            ArgumentRule(argument=4, upper=True, values=frozenset({0})),
            _none_of(3, _FAST_OPEN, mask=_FAST_OPEN),
        ),
        "mmap": (
            _none_of(3, _STACK, mask=_STACK),
            _none_of(3, _SHARED_NAMELESS, mask=_SHARED_NAMELESS),
        ),
    }
    if gpu:
        found["mmap"] = (_none_of(3, _STACK, mask=_STACK),)
        found["memfd_create"] = ()
    internet = (int(socket.AF_INET), int(socket.AF_INET6))
    if loopback:
        netlink = 16  # asks for the interfaces, of which there is one
        found["socket"] = (_one_of(0, *internet, netlink),)
        found["sendto"] = ()
        found |= dict.fromkeys(_OF_SERVERS, ())
    elif reaches:
        # Plain TCP only: Landlock's rules for ports say nothing of the others.
        stream = _one_of(1, int(socket.SOCK_STREAM), mask=0xF)
        found["socket"] = (
            _one_of(0, *internet), stream, _one_of(2, 0, int(socket.IPPROTO_TCP)),
        )  # fmt: skip
        found["connect"] = ()
    return found


# --- the program ----------------------------------------------------------------------------------

_LOAD, _JUMP, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x05, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_REFUSE = _ERRNO | errno.EPERM
_MISSING = _ERRNO | errno.ENOSYS
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

Step = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def _checked(number: int, conditions: Iterable[ArgumentRule]) -> list[Step]:
    body: list[Step] = []
    for condition in conditions:
        body.append((_LOAD, 0, 0, _ARGUMENTS + 8 * condition.argument + 4 * condition.upper))
        body.append((_AND, 0, 0, condition.mask))
        values = sorted(condition.values)
        for left, value in zip(range(len(values) - 1, -1, -1), values, strict=True):
            # Found: past the refusal, or onto it where a jump stands before it.
            body.append((_EQUAL, left + 1, 0, value))
        if condition.excluded:
            body.append((_JUMP, 0, 0, 1))
        body.append((_RETURN, 0, 0, _REFUSE))
    body.append((_RETURN, 0, 0, _ALLOW))
    return [(_EQUAL, 0, len(body), number), *body]


def program(
    machine: str, *, pid: int, reaches: bool = False, loopback: bool = False, gpu: bool = False
) -> list[Step]:
    """The filter of a machine (`platform.machine()`), for the process `pid`.

    Raises
    ------
    OSError
        The machine's numbers are not known here.
    """
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"the filter knows x86_64 and aarch64, not {machine}")
    column, architecture = _ARCHITECTURES[machine]
    steps: list[Step] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),  # a call by the numbers of another machine, such as 32-bit ones
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE),
        (_AT_LEAST, 0, 1, _NEWEST + 1),
        (_RETURN, 0, 0, _MISSING),
    ]
    conditions = _conditions(pid=pid, reaches=reaches, loopback=loopback, gpu=gpu)
    for name, numbers in (ALWAYS | CHECKED).items():
        number = numbers[column]
        if number is not None and (name in ALWAYS or name in conditions):
            steps += _checked(number, conditions.get(name, ()))
    # Its flags lie in memory that a filter can't read; the C library then takes clone.
    steps += [(_EQUAL, 0, 1, CHECKED["clone3"][column] or 0), (_RETURN, 0, 0, _MISSING)]
    return [*steps, (_RETURN, 0, 0, _REFUSE)]


def install(*, reaches: bool, loopback: bool, gpu: bool) -> None:
    """Bind this process to the filter for good; there must be no other thread. Raises `OSError`."""
    steps = program(
        platform.machine(), pid=os.getpid(), reaches=reaches, loopback=loopback, gpu=gpu
    )
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    filled = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("=H6xQ", len(steps), ctypes.addressof(filled))
    call("prctl", 22, 2, ctypes.create_string_buffer(head, len(head)), 0, 0)
