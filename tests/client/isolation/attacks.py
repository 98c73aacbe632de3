"""Attacks from inside a confined process, each in a child of this script that ends right after.

Run as a program in a folder of its own; reads cases (a list of [layers, attack]) from its input and
writes how each ended: "done", or "refused" with the reason. ``null`` for layers means all of them, an
empty list none. The victim is another process of the same account, as a site's daemon is.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import traceback
from pathlib import Path

from silotune.client.isolation import kernel
from silotune.client.isolation.confinement import Confinement, confine

HERE = Path.cwd()
STATE, RECORDS, OTHER, MODEL, SCRATCH = (
    HERE / name for name in ("state", "records", "other", "model", "scratch")
)
KEY, ROWS, OTHER_ROWS, WEIGHTS = (
    STATE / "signing.key", RECORDS / "rows.csv", OTHER / "rows.csv", MODEL / "model.safetensors",
)  # fmt: skip
MEMORY = 400_000_000
LIBC = ctypes.CDLL(None, use_errno=True)
BYTECODE = Path(__file__).parent / "__pycache__" / "planted.pyc"

VICTIM = """
import ctypes, json, os, signal, socket, sys
told = int(sys.argv[1])
signal.signal(signal.SIGUSR1, lambda *_: os.write(told, b"s"))
secret = ctypes.create_string_buffer(b"a key in the daemon's memory")
tcp, six, path, abstract = (socket.socket(f) for f in (
    socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_UNIX))
udp = socket.socket(type=socket.SOCK_DGRAM)
tcp.bind(("127.0.0.1", 0)); six.bind(("::1", 0)); path.bind("state/daemon.sock")
udp.bind(("127.0.0.1", 0)); abstract.bind("\\0silotune-" + str(os.getpid()))
for each in (tcp, six, path, abstract): each.listen(500)
print(json.dumps([os.getpid(), tcp.getsockname()[1], six.getsockname()[1], udp.getsockname()[1],
                  ctypes.addressof(secret)]), flush=True)
while True:
    udp.recv(10); os.write(told, b"u")
"""


class Stage:
    """The victim, and what a child has in its hands before it is confined."""

    def __init__(self):
        self.heard, told = os.pipe()
        os.set_inheritable(told, True)
        os.set_blocking(self.heard, False)
        self.victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(told)],
            env={"DATABASE_PASSWORD": "hunter2"}, pass_fds=[told], stdout=subprocess.PIPE,
        )  # fmt: skip
        self.pid, self.port, self.port6, self.udp, self.address = json.loads(
            self.victim.stdout.readline()
        )
        os.close(told)

    def hears(self, sign):
        """Whether the victim was reached."""
        ready, _, _ = select.select([self.heard], [], [], 0.25)
        return bool(ready) and sign in os.read(self.heard, 100)

    def quiet(self):
        while select.select([self.heard], [], [], 0)[0]:
            os.read(self.heard, 100)


def call(number, *arguments):
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = LIBC.syscall(ctypes.c_long(number), *passed)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


X86 = os.uname().machine == "x86_64"
NUMBERS = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "kcmp": (312, 272),
    "clone": (56, 220), "clone3": (435, 435), "execveat": (322, 281), "io_uring_setup": (425, 425),
    "shmget": (29, 194), "add_key": (248, 217), "userfaultfd": (323, 282), "unshare": (272, 97),
    "rt_sigqueueinfo": (129, 138), "tgkill": (234, 131), "mount": (165, 40), "bpf": (321, 280),
    "perf_event_open": (298, 241), "name_to_handle_at": (303, 264),
}  # fmt: skip


def number(name):
    return NUMBERS[name][0 if X86 else 1]


# --- attacks: each raises OSError if it is refused -----------------------------------------------
# What an attack yields up to its first `yield` happens before the confinement.


def opens_socket(family, kind=socket.SOCK_STREAM):
    def attack(stage):
        yield
        socket.socket(getattr(socket, family), kind).close()

    return attack


def connects(stage):
    yield
    with socket.socket() as line:
        line.connect(("127.0.0.1", stage.port))


def connects_six(stage):
    yield
    with socket.socket(socket.AF_INET6) as line:
        line.connect(("::1", stage.port6))


def connects_by_path(stage):
    yield
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(STATE / "daemon.sock"))


def connects_by_name(stage):
    yield
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(f"\0silotune-{stage.pid}")


def connects_an_inherited_socket(stage):
    with socket.socket() as line:
        yield
        line.connect(("127.0.0.1", stage.port))


def sends_by_an_inherited_socket(stage):
    with socket.socket(type=socket.SOCK_DGRAM) as line:
        yield
        line.sendto(b"x", ("127.0.0.1", stage.udp))
        if not stage.hears(b"u"):
            raise OSError(errno.EIO, "nothing came")


def sends_a_message_by_an_inherited_socket(stage):
    with socket.socket(type=socket.SOCK_DGRAM) as line:
        yield
        line.sendmsg([b"x"], [], 0, ("127.0.0.1", stage.udp))
        if not stage.hears(b"u"):
            raise OSError(errno.EIO, "nothing came")


def connects_by_fast_open(stage):
    with socket.socket() as line:
        yield
        line.sendto(b"x", 0x20000000, ("127.0.0.1", stage.port))


def reads(path):
    def attack(stage):
        yield
        Path(str(path).format(pid=stage.pid)).read_bytes()

    return attack


def reads_memory(stage):
    yield
    with Path(f"/proc/{stage.pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(stage.address)
        assert memory.read(5) == b"a key"


def reads_by_an_inherited_folder(stage):
    folder = os.open(STATE, os.O_RDONLY)
    yield
    os.close(os.open(KEY.name, os.O_RDONLY, dir_fd=folder))


def traces(stage):
    yield
    call(number("ptrace"), 0x4206, stage.pid, 0, 0)  # PTRACE_SEIZE: ends with the tracer


def reads_by_vm(stage):
    buffer = ctypes.create_string_buffer(5)
    own = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(buffer), 5), 16)
    yield
    remote = ctypes.create_string_buffer(struct.pack("=QQ", stage.address, 5), 16)
    call(number("process_vm_readv"), stage.pid, own, 1, remote, 1, 0)


def takes_a_descriptor(stage):
    yield
    found = call(number("pidfd_open"), stage.pid, 0)
    os.close(call(number("pidfd_getfd"), found, 1, 0))


def compares(stage):
    yield
    call(number("kcmp"), os.getpid(), stage.pid, 1, 0, 0)


def arrives(stage):
    if not stage.hears(b"s"):
        raise PermissionError(errno.EPERM, "no signal came")


def signals(stage):
    yield
    os.kill(stage.pid, signal.SIGUSR1)
    arrives(stage)


def signals_a_thread(stage):
    yield
    call(number("tgkill"), stage.pid, stage.pid, signal.SIGUSR1)
    arrives(stage)


def signals_by_descriptor(stage):
    found = call(number("pidfd_open"), stage.pid, 0)
    yield
    call(number("pidfd_send_signal"), found, signal.SIGUSR1, None, 0)
    arrives(stage)


def signals_through_a_socket(stage):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield
        fcntl.fcntl(ours, fcntl.F_SETOWN, stage.pid)
        fcntl.fcntl(ours, 10, signal.SIGUSR1)  # F_SETSIG
        fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC)
        theirs.send(b"x")
        arrives(stage)


def limits_the_victim(stage):
    yield
    resource.prlimit(
        stage.pid, resource.RLIMIT_CPU, resource.prlimit(stage.pid, resource.RLIMIT_CPU)
    )


def moves_the_victim(stage):
    yield
    os.sched_setaffinity(stage.pid, os.sched_getaffinity(stage.pid))


def slows_the_victim(stage):
    yield
    os.setpriority(os.PRIO_PROCESS, stage.pid, os.getpriority(os.PRIO_PROCESS, stage.pid))


def on_files(action):
    def attack(stage):
        yield
        action()

    return attack


def shells(stage):
    yield
    os.execv("/bin/sh", ["sh", "-c", "exit 42"])


def spawns(stage):
    yield
    os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", "true"], {}), 0)


def executes_memory(stage):
    program = Path("/bin/true").read_bytes()
    found = os.memfd_create("program")
    os.write(found, program)
    os.set_inheritable(found, True)
    yield
    arguments = (ctypes.c_char_p * 2)(b"true", None)
    call(number("execveat"), found, b"", arguments, (ctypes.c_char_p * 1)(None), 0x1000)


def forks(stage):
    yield
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def clones(stage):
    yield
    child = call(number("clone"), signal.SIGCHLD | 0x4000, 0, 0, 0, 0)  # CLONE_VFORK
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def clones_anew(stage):
    yield
    given = ctypes.create_string_buffer(
        struct.pack("=11Q", 0, 0, 0, 0, signal.SIGCHLD, *[0] * 6), 88
    )
    child = call(number("clone3"), given, 88)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def starts_threads(stage):
    if os.getuid() == 0:  # the kernel bounds no account that is root's
        os.setgroups([])
        os.setresgid(54321, 54321, 54321)
        os.setresuid(54321, 54321, 54321)
        LIBC.prctl(4, 1, 0, 0, 0)  # as after a program's start
    yield
    done = threading.Event()
    try:
        for _ in range(150):
            threading.Thread(target=done.wait, daemon=True).start()
    except RuntimeError as exc:
        raise OSError(errno.EAGAIN, str(exc)) from exc
    finally:
        done.set()


def asks(name, *arguments):
    def attack(stage):
        yield
        call(number(name), *arguments)

    return attack


def maps(flags):
    def attack(stage):
        yield
        mmap.mmap(-1, 2 * MEMORY, flags=flags).close()

    return attack


def maps_the_zero_device(stage):
    yield
    with Path("/dev/zero").open("r+b") as zero:
        mmap.mmap(zero.fileno(), 2 * MEMORY).close()


def fills_a_nameless_file(stage):
    yield
    os.ftruncate(os.memfd_create("large"), 2 * MEMORY)


def fills_shared_memory(stage):
    place = Path(f"/dev/shm/planted-{os.getpid()}")
    yield
    with place.open("wb") as file:
        place.unlink()
        file.truncate(2 * MEMORY)


def calls_by_32_bits(stage):
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20 (getpid); int 0x80; ret
    run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    yield
    if run() != os.getpid():
        raise OSError(errno.ENOSYS, "the kernel has none")


def types_into_a_terminal(stage):
    _, slave = os.openpty()
    yield
    fcntl.ioctl(slave, termios.TIOCSTI, b"x")


def leaves_a_core(stage):
    os.chdir(SCRATCH)
    yield
    os.abort()


def binds_a_socket_file():
    with socket.socket(socket.AF_UNIX) as line:
        line.bind(str(SCRATCH / "door"))


def plants_bytecode():
    BYTECODE.parent.mkdir(exist_ok=True)
    BYTECODE.write_bytes(b"")


def mounts(stage):
    yield
    call(number("mount"), b"none", b"scratch", b"tmpfs", 0, None)
    LIBC.umount2(b"scratch", 2)


INFORM = ctypes.create_string_buffer(200)
ATTACKS = {
    "socket inet": opens_socket("AF_INET"),
    "socket inet6": opens_socket("AF_INET6"),
    "socket unix": opens_socket("AF_UNIX"),
    "socket netlink": opens_socket("AF_NETLINK", socket.SOCK_RAW),
    "socket packet": opens_socket("AF_PACKET", socket.SOCK_RAW),
    "connect": connects,
    "connect inet6": connects_six,
    "connect unix": connects_by_path,
    "connect abstract": connects_by_name,
    "connect inherited": connects_an_inherited_socket,
    "connect fast open": connects_by_fast_open,
    "send inherited": sends_by_an_inherited_socket,
    "send message inherited": sends_a_message_by_an_inherited_socket,
    "read keys": reads(KEY),
    "read keys by proc": reads(f"/proc/self/root{KEY}"),
    "read keys by folder": reads_by_an_inherited_folder,
    "read other dataset": reads(OTHER_ROWS),
    "read environ": reads("/proc/{pid}/environ"),
    "read maps": reads("/proc/{pid}/maps"),
    "read cmdline": reads("/proc/{pid}/cmdline"),
    "read memory": reads_memory,
    "read memory by call": reads_by_vm,
    "trace": traces,
    "take descriptor": takes_a_descriptor,
    "compare": compares,
    "signal": signals,
    "signal thread": signals_a_thread,
    "signal by descriptor": signals_by_descriptor,
    "signal by socket": signals_through_a_socket,
    "limit": limits_the_victim,
    "affinity": moves_the_victim,
    "priority": slows_the_victim,
    "write outside": on_files(lambda: (HERE / "note").write_text("x")),
    "write model": on_files(lambda: WEIGHTS.open("r+b").write(b"x")),
    "truncate model": on_files(lambda: os.truncate(WEIGHTS, 1)),
    "remove model": on_files(WEIGHTS.unlink),
    "replace model": on_files(lambda: (SCRATCH / "file").rename(WEIGHTS)),
    "move model": on_files(lambda: WEIGHTS.rename(SCRATCH / "taken")),
    "write bytecode": on_files(plants_bytecode),
    "mode of key": on_files(lambda: KEY.chmod(0o644)),
    "owner of key": on_files(lambda: os.chown(KEY, os.getuid(), os.getgid())),
    "times of model": on_files(lambda: os.utime(WEIGHTS, (1, 1))),
    "attribute of model": on_files(lambda: os.setxattr(WEIGHTS, "user.x", b"x")),
    "hard link": on_files(lambda: os.link(KEY, SCRATCH / "key")),
    "symbolic link": on_files(lambda: (SCRATCH / "etc").symlink_to("/etc")),
    "named pipe": on_files(lambda: os.mkfifo(SCRATCH / "pipe")),
    "socket file": on_files(binds_a_socket_file),
    "shell": shells,
    "spawn": spawns,
    "execute memory": executes_memory,
    "fork": forks,
    "vfork": clones,
    "clone3": clones_anew,
    "threads": starts_threads,
    "memory": maps(mmap.MAP_PRIVATE),
    "memory shared": maps(mmap.MAP_SHARED),
    "memory of stacks": maps(mmap.MAP_PRIVATE | 0x100),
    "memory dev zero": maps_the_zero_device,
    "memory file": fills_a_nameless_file,
    "memory dev shm": fills_shared_memory,
    "memory sysv": asks("shmget", 0, 2 * MEMORY, 0o600),
    "io_uring": asks("io_uring_setup", 1, INFORM),
    "userfaultfd": asks("userfaultfd", 0),
    "keyring": asks("add_key", b"user", b"x", b"x", 1, -2),
    "namespaces": asks("unshare", 0x10000000),
    "mount": mounts,
    "32 bits": calls_by_32_bits,
    "terminal": types_into_a_terminal,
    "core": leaves_a_core,
}


def lay_out():
    """The site's folders, as they are before each attack."""
    for folder in (STATE, RECORDS, OTHER, MODEL, SCRATCH):
        folder.mkdir(exist_ok=True)
    for path in (*SCRATCH.iterdir(), BYTECODE, HERE / "note"):
        path.unlink(missing_ok=True)
    for path in (KEY, ROWS, OTHER_ROWS, WEIGHTS, SCRATCH / "file"):
        path.write_text("private")
    KEY.chmod(0o600)


def confinement(stage):
    return Confinement(
        reach=("127.0.0.1", stage.port) if "--reach" in sys.argv else None,
        read=(ROWS, MODEL),
        write=(SCRATCH,),
        memory=MEMORY,
        processes=60,
        loopback="--loopback" in sys.argv,
    )


def in_child(layers, attack, stage, answer):
    """What a case's child does; it ends here."""
    told = "done"
    try:
        signal.alarm(10)
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        steps = ATTACKS[attack](stage)
        next(steps)
        confine(confinement(stage), only=layers)
        next(steps, None)
    except OSError as exc:
        told = f"refused {errno.errorcode.get(exc.errno, exc.errno)}"
    except BaseException:
        told = traceback.format_exc()
    os.write(answer, told.encode()[-3000:])
    os._exit(0)


def outcome(layers, attack, stage):
    lay_out()
    stage.quiet()
    heard, answer = os.pipe()
    child = os.fork()
    if child == 0:
        in_child(layers, attack, stage, answer)
    os.close(answer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(heard) as reader:
        told = reader.read()
    if attack == "core":
        left = [path for path in SCRATCH.iterdir() if "core" in path.name]
        return "done" if left else "refused"
    if told:
        return told
    if status == -signal.SIGSYS:
        return "refused SIGSYS"
    return (
        "done" if (attack, status) in {("shell", 42), ("execute memory", 0)} else f"ended {status}"
    )


def become_an_ordinary_account():
    """An account without rights, as root too: in a user namespace where root is not the owner."""
    user, group = f"1000 {os.getuid()} 1", f"1000 {os.getgid()} 1"
    LIBC.unshare(0x10000000)
    for name, line in (("setgroups", "deny"), ("gid_map", group), ("uid_map", user)):
        Path("/proc/self", name).write_text(line)
    if "--no-namespaces" in sys.argv:
        Path("/proc/sys/user/max_user_namespaces").write_text("0")  # of those in this one
    kernel.drop_capabilities()
    LIBC.prctl(4, 1, 0, 0, 0)


def main():
    if "--ordinary" in sys.argv and (os.getuid() == 0 or "--no-namespaces" in sys.argv):
        become_an_ordinary_account()
    lay_out()
    stage = Stage()
    try:
        cases = json.load(sys.stdin)
        print(json.dumps([outcome(layers, attack, stage) for layers, attack in cases]))
    finally:
        stage.victim.kill()
        stage.victim.wait()
        BYTECODE.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
