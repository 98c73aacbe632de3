"""The filter's program, run here by an interpreter of our own for each call there is."""

import ctypes
import errno
import socket

import pytest

from silotune.client.isolation.seccomp import ALWAYS, CHECKED, program

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED, KILLED = 0x7FFF0000, 0x80000000
PID = 4711


def run(steps, *, architecture, number, arguments=()):
    """A classic BPF machine, as far as the program uses it."""
    data = [number, architecture, 0, 0]
    for value in (*arguments, *[0] * (6 - len(arguments))):
        data += [value & 0xFFFFFFFF, value >> 32]
    place = accumulator = 0
    while True:
        code, jt, jf, operand = steps[place]
        place += 1
        match code:
            case 0x20:
                accumulator = data[operand // 4]
            case 0x54:
                accumulator &= operand
            case 0x05:
                place += operand
            case 0x15:
                place += jt if accumulator == operand else jf
            case 0x35:
                place += jt if accumulator >= operand else jf
            case 0x06:
                return operand
            case _:
                raise AssertionError(code)


def refused(number=errno.EPERM):
    return 0x00050000 | number


@pytest.fixture(scope="module")
def numbers():
    """libseccomp's own table: the number of a call by name on a machine; negative if it has none."""
    resolve = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name_arch
    resolve.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    return lambda machine, name: resolve(ARCHITECTURES[machine], name.encode())


@pytest.mark.parametrize("column, machine", list(enumerate(ARCHITECTURES)))
def test_the_numbers_are_those_of_libseccomp(column, machine, numbers):
    for name, own in (ALWAYS | CHECKED).items():
        found = numbers(machine, name)
        assert own[column] == (found if found >= 0 else None), name


DANGEROUS = """
execve execveat fork vfork ptrace process_vm_readv process_vm_writev kcmp pidfd_open pidfd_getfd
pidfd_send_signal tkill rt_sigqueueinfo socketpair socket connect bind listen accept accept4 sendmsg
sendmmsg memfd_create memfd_secret shmget shmat semget msgget mq_open io_setup io_uring_setup
io_uring_enter io_uring_register userfaultfd bpf perf_event_open keyctl add_key request_key mount
umount2 move_mount fsopen fsmount open_tree mount_setattr pivot_root chroot unshare setns chmod
fchmod fchmodat fchmodat2 chown fchownat setxattr fsetxattr removexattr utimensat link linkat
symlink symlinkat mknod mknodat name_to_handle_at open_by_handle_at fanotify_init inotify_add_watch
init_module finit_module delete_module kexec_load kexec_file_load reboot swapon quotactl acct
settimeofday clock_settime adjtimex sethostname setuid setgid setreuid setresuid setgroups setfsuid
capset setpriority sched_setscheduler sched_setattr ioprio_set migrate_pages move_pages
process_madvise process_mrelease personality ioperm iopl modify_ldt syslog vhangup seccomp
landlock_restrict_self splice vmsplice tee lookup_dcookie remap_file_pages
"""


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_what_is_not_listed_is_refused(machine, numbers):
    steps = program(machine, pid=PID)
    names = DANGEROUS.split()
    known = [numbers(machine, name) for name in names]
    assert sum(number >= 0 for number in known) > 90
    for name, number in zip(names, known, strict=True):
        if number >= 0:
            ended = run(steps, architecture=ARCHITECTURES[machine], number=number)
            assert ended == refused(), name
    allowed = [
        number
        for number in range(600)
        if run(steps, architecture=ARCHITECTURES[machine], number=number) == ALLOWED
    ]
    listed = {own[list(ARCHITECTURES).index(machine)] for own in (ALWAYS | CHECKED).values()}
    assert set(allowed) <= listed
    assert len(allowed) > 130


def test_another_machines_calls_end_the_process_and_unknown_ones_are_said_to_be_missing():
    steps = program("x86_64", pid=PID)
    assert run(steps, architecture=0x40000003, number=3) == KILLED  # i386
    assert run(steps, architecture=0xC000003E, number=0x40000000) == refused()  # x32
    assert run(steps, architecture=0xC000003E, number=463) == refused(errno.ENOSYS)
    assert run(steps, architecture=0xC000003E, number=435) == refused(errno.ENOSYS)  # clone3
    with pytest.raises(OSError, match="riscv64"):
        program("riscv64", pid=PID)


def answer(name, *arguments, **may):
    column, steps = 0, program("x86_64", pid=PID, **may)
    number = CHECKED[name][column]
    found = run(steps, architecture=0xC000003E, number=number, arguments=arguments)
    return {ALLOWED: "allowed", refused(): "refused"}[found]


@pytest.mark.parametrize(
    "name, allowed, forbidden",
    [
        ("clone", [(0x3D0F00,)], [(17,), (0x3D0F00 | 0x20000000,), (0x4111,)]),
        ("kill", [(PID, 6), (PID | 1 << 40, 6)], [(0, 9), (1, 9), (PID - 1, 9), (2**32 - 1, 9)]),
        ("tgkill", [(PID, PID + 1, 6)], [(1, 1, 9)]),
        ("prlimit64", [(0, 7), (PID, 7)], [(1, 7)]),
        ("fcntl", [(3, 1), (3, 1030)], [(3, 8, 1), (3, 10, 9), (3, 15), (3, 1024), (3, 1026)]),
        ("ioctl", [(3, 0x5421)], [(0, 0x5412), (0, 0x541C), (3, 0x8901), (3, 0x8902)]),
        ("ioctl", [(3, 0x5421)], [(0, 0x5412 | 7 << 32)]),
        ("prctl", [(15, 1)], [(4, 1), (22, 2), (0x59616D61, 1), (35, 1)]),
        ("mmap", [(0, 9, 3, 0x22), (0, 9, 3, 0x20022), (0, 9, 1, 1)], [(0, 9, 3, 0x21)]),
        ("mmap", [(0, 9, 3, 0x02)], [(0, 9, 3, 0x122), (0, 9, 3, 0x23), (0, 9, 3, 0x102)]),
        ("sendto", [(3, 1, 1, 0x4000)], [(3, 1, 1, 0, 8), (3, 1, 1, 0, 1 << 40), (3, 1, 1, 1 << 29)]),
    ],
)  # fmt: skip
def test_an_argument_decides(name, allowed, forbidden):
    assert {answer(name, *given) for given in allowed} == {"allowed"}
    assert {answer(name, *given) for given in forbidden} == {"refused"}


def test_a_process_that_reaches_an_address_has_plain_tcp_and_listens_to_nobody():
    tcp = (int(socket.AF_INET), int(socket.SOCK_STREAM) | 0o2000000, 6)
    assert answer("socket", *tcp, reaches=True) == "allowed"
    assert answer("connect", 3, 1, 1, reaches=True) == "allowed"
    for family, kind, protocol in [
        (2, 2, 0),
        (2, 1, 262),
        (2, 1, 132),
        (1, 1, 0),
        (16, 3, 0),
        (43, 1, 0),
    ]:
        assert answer("socket", family, kind, protocol, reaches=True) == "refused"
    for name in ("bind", "listen", "accept", "sendmsg", "memfd_create"):
        assert answer(name, reaches=True) == "refused"
