"""Confining a child process that reads records: layer upon layer, each said to be in force or not.

The child calls `confine` once, alone in its process, before it imports PyTorch and before it opens
anything of the site. What this kernel lacks, or doesn't let this account do, is left out and said; what
a site requires, the caller compares (`require`). Each layer is tried after it is put up, so that "in
force" is what was seen. docs/security.md has the table of which layer refuses what.

There is no way back from any of them.
"""

from __future__ import annotations

import errno
import glob
import json
import mmap
import os
import re
import resource
import site as installation
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import get_args

from silotune.client.data_parallel import processes_for
from silotune.client.errors import IsolationMissing
from silotune.client.isolation import kernel, landlock, seccomp
from silotune.client.training.database import address_of
from silotune.data.site import ProtectionName, SiteConfig, expand_url


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """What a process may do besides computing.

    Attributes
    ----------
    read : tuple of Path
        Files, and folders with all below them, that it may read: base models, records. Python's own
        installation, system libraries and what tells it about the processor are added.
    write : tuple of Path
        Folders in which it may make, change and remove plain files and folders.
    reach : (str, int) or None
        The one address it may connect to by TCP. The kernel holds it to the *port*; the process then
        shares the machine's network.
    memory : int or None
        Most private memory, in bytes.
    processes : int or None
        Most threads. It can start no process in any case.
    gpu : bool
        Whether it may use NVIDIA's and AMD's devices, and memory that is shared with them.
    loopback : bool
        Whether several processes share its network and talk within it. Without a network of its own it
        stays without sockets.
    """

    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()
    reach: tuple[str, int] | None = None
    memory: int | None = None
    processes: int | None = 2048
    gpu: bool = False
    loopback: bool = False


@dataclass(frozen=True, kw_only=True)
class Protection:
    """One layer of the confinement.

    Attributes
    ----------
    name : str
        As in ``[isolation] require`` of site.toml.
    in_force : bool
        It was put up, and refused what it was tried with.
    reason : str
        Why it is not in force; empty if it is.
    """

    name: ProtectionName
    in_force: bool
    reason: str = ""

    @property
    def lack(self) -> str:
        """What it means that it is not in force."""
        return f"{self.name} is not in force ({self.reason}): {MEANINGS[self.name]}"


MEANINGS: Mapping[ProtectionName, str] = {
    "no_new_privileges": "it could gain rights through programs such as sudo",
    "user_namespace": "it could read the memory of this account's other processes",
    "network_namespace": "without the system-call filter it could reach the network",
    "ipc_namespace": "without the system-call filter it could share memory with other processes",
    "capabilities": "it would keep the rights of root",
    "memory_hidden": "a crash could write records to a core file",
    "memory_limit": "a record could use up the machine's memory",
    "process_limit": "it could start threads without end",
    "landlock_files": "it could open every file of this account, the keys among them",
    "landlock_network": "where it reads a database it could connect to any address",
    "landlock_scopes": "without the system-call filter it could send signals to other processes",
    "seccomp": "it could ask the kernel for anything: sockets, programs, other processes' memory",
}
"""What a process could do without each protection."""

_SYSTEM = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo",
    "/etc/ld.so.cache", "/etc/localtime", "/proc/self", "/proc/cpuinfo", "/proc/meminfo",
    "/proc/stat", "/proc/sys/vm", "/sys/devices/system", "/dev/zero", "/dev/random", "/dev/urandom",
)  # fmt: skip
_GPU_FILES = (
    "/proc/driver/nvidia*", "/proc/devices", "/proc/modules", "/sys/bus/pci", "/sys/devices",
    "/sys/module/nvidia*", "/sys/class/kfd", "/sys/class/drm", "/usr/local/cuda*", "/opt/rocm*",
    "/usr/local/nvidia", "/usr/share/nvidia",
)  # fmt: skip
_GLOO_FILES = (
    "/sys/bus/pci",
    "/sys/class/net",
    "/sys/devices",
)  # it asks which card a network is on
_LET_THROUGH = "the kernel took the rules and lets through what they refuse"
_GPU_DEVICES = ("/dev/nvidia*", "/dev/kfd", "/dev/dri")


def confine(
    confinement: Confinement,
    *,
    share: Callable[[], None] | None = None,
    only: Collection[ProtectionName] | None = None,
) -> tuple[Protection, ...]:
    """Bind this process, and all that it will ever start, to a confinement; for good.

    Parameters
    ----------
    confinement : Confinement
        What it may do.
    share : callable, optional
        With `loopback`, called once this process has a network of its own, to start processes that share
        it; each goes on from there, and is confined like this one. Not called where it has none.
    only : collection of str, optional
        Put up these layers alone, and the first, without which most can't be: it shows what each does.

    Returns
    -------
    tuple of Protection
        Every layer, in force or not.

    Raises
    ------
    RuntimeError
        The process has other threads, which some layers would miss.
    """
    layers = {
        name: layer
        for name, layer in _LAYERS.items()
        if only is None or name in ("no_new_privileges", *only)
    }
    if sys.platform != "linux":
        why = f"{sys.platform} has none of it"
        return tuple(Protection(name=name, in_force=False, reason=why) for name in layers)
    if kernel.threads() != 1:
        raise RuntimeError("a process is confined before it starts threads")
    kernel.go_first()
    found = [_put_up(name, layers[name], confinement) for name in layers if name in _NAMESPACES]
    alone = Protection(name="network_namespace", in_force=True) in found
    confinement = replace(confinement, loopback=confinement.loopback and alone)
    if confinement.loopback:
        kernel.raise_loopback()
        if share is not None:
            share()
    others = [name for name in layers if name not in _NAMESPACES]
    return (*found, *(_put_up(name, layers[name], confinement) for name in others))


def offered(confinement: Confinement | None = None) -> tuple[Protection, ...]:
    """What this machine would put up, found out in a process that ends right after."""
    try:
        told = _tried(json.dumps(asdict(confinement or Confinement()), default=str))
    except subprocess.CalledProcessError as exc:
        why = f"a process that tried ended with {exc.returncode}: {exc.stderr.strip()[-200:]}"
        return tuple(Protection(name=name, in_force=False, reason=why) for name in _LAYERS)
    return tuple(Protection(**found) for found in json.loads(told))


@cache
def _tried(asked: str) -> str:
    """What `_tell` printed: the kernel stays the same as long as this process lives."""
    command = [sys.executable, "-P", "-m", __name__, asked]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
    return ran.stdout


def require(found: Collection[Protection], names: Collection[ProtectionName]) -> None:
    """Insist on protections that a site can't do without.

    Raises
    ------
    IsolationMissing
        One of them is not in force.
    """
    missing = [p for p in found if p.name in names and not p.in_force]
    if missing:
        told = "; ".join(f"{p.name}: {p.reason}" for p in missing)
        raise IsolationMissing(f"[isolation] requires what is not in force here: {told}")


def checked(site: SiteConfig) -> tuple[Protection, ...]:
    """What a site's processes that read records will have here; of a layer that one of them lacks, why.

    Raises
    ------
    IsolationMissing
        Something that its site.toml requires will not be in force for one of its datasets.
    SiteConfigInvalid
        The URL of a database names an environment variable that is not set.
    """
    memory, gpu = site.resources.memory_mb, site.resources.device != "cpu"
    limit = None if memory is None else memory * 1_000_000
    together = processes_for(site.resources) > 1
    plain = Confinement(memory=limit, gpu=gpu, loopback=together)
    found = list(offered(plain))
    for name, dataset in site.datasets.items():
        place = address_of("" if dataset.url is None else expand_url(dataset.url))
        if place is not None:
            # The port alone matters to the kernel: one process tries for all databases on one.
            reaching = offered(replace(plain, reach=("localhost", place[1])))
            found = [
                replace(there, reason=f"{there.reason} (dataset {name})")
                if here.in_force and not there.in_force
                else here
                for here, there in zip(found, reaching, strict=True)
            ]
    require(found, site.isolation.require)
    return tuple(found)


def _put_up(
    name: ProtectionName, layer: Callable[[Confinement], None], confinement: Confinement
) -> Protection:
    try:
        layer(confinement)
    except OSError as exc:
        return Protection(name=name, in_force=False, reason=exc.strerror or str(exc))
    return Protection(name=name, in_force=True)


# --- the layers -----------------------------------------------------------------------------------


def _no_new_privileges(_: Confinement) -> None:
    kernel.set_no_new_privileges()


def _namespace(name: str, flag: int) -> Callable[[Confinement], None]:
    def enter(confinement: Confinement) -> None:
        if name == "net" and confinement.reach is not None:
            raise OSError(errno.EPERM, "the process reaches an address, by the machine's network")
        # Tried in a child first: refused half-way, this process would be left without a name.
        _try_in_child(lambda: kernel.enter_namespaces(flag))
        before = kernel.namespace(name)
        kernel.enter_namespaces(flag)
        if kernel.namespace(name) == before:
            raise OSError(errno.EINVAL, "the kernel took the call and did nothing")

    return enter


def _try_in_child(action: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        number = 0
        try:
            action()
        except OSError as exc:
            number = exc.errno or errno.EPERM
        finally:
            os._exit(number)
    if number := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise OSError(number, f"the kernel doesn't let this account: {os.strerror(number)}")


def _capabilities(_: Confinement) -> None:
    kernel.drop_capabilities()


def _memory_hidden(_: Confinement) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kernel.hide_memory()


def _memory_limit(confinement: Confinement) -> None:
    if confinement.memory is None:
        raise OSError(errno.EINVAL, "resources.memory_mb of site.toml sets none")
    _bound(resource.RLIMIT_DATA, confinement.memory)
    try:
        mmap.mmap(-1, confinement.memory, flags=mmap.MAP_PRIVATE).close()
    except OSError:
        return
    raise OSError(errno.EINVAL, _LET_THROUGH)


def _process_limit(confinement: Confinement) -> None:
    if confinement.processes is None:
        raise OSError(errno.EINVAL, "none is set")
    release = tuple(int(n) for n in re.findall(r"\d+", os.uname().release)[:2])
    alone = Path("/proc/self/uid_map").read_text().split()[2] == "1"
    if release < (5, 14) or not alone:
        # It would count whatever else the account runs.
        raise OSError(errno.EPERM, "it needs a user namespace of its own, and Linux 5.14")
    limit = _bound(resource.RLIMIT_NPROC, confinement.processes)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, limit))
    try:
        _try_in_child(lambda: None)
    except BlockingIOError:
        return
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
    raise OSError(errno.EPERM, "the kernel bounds no account that is root's")


def _bound(kind: int, limit: int) -> int:
    _, hard = resource.getrlimit(kind)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))
    return limit


def _landlock_files(confinement: Confinement) -> None:
    devices = [Path(p) for pattern in _GPU_DEVICES for p in glob.glob(pattern)]  # noqa: PTH207
    landlock.restrict_files(
        [
            *((path, landlock.READ) for path in (*confinement.read, *needed(confinement))),
            *((path, landlock.WRITE) for path in confinement.write),
            *((path, landlock.DEVICE) for path in devices if confinement.gpu),
            (Path("/dev/null"), landlock.READ | landlock.DEVICE),
        ]
    )
    _must_fail(lambda: os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY)))


def needed(confinement: Confinement) -> list[Path]:
    """Python's installation, this package, and what libraries ask of the machine."""
    paths = sysconfig.get_paths()
    own = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    package = Path(__file__).resolve().parents[2]
    patterns = (
        *(_GPU_FILES if confinement.gpu else ()),
        *(_GLOO_FILES if confinement.loopback else ()),
    )
    found = [p for pattern in patterns for p in glob.glob(pattern)]  # noqa: PTH207
    return [package, *map(Path, [*own, *installation.getsitepackages(), *_SYSTEM, *found])]


def _landlock_network(confinement: Confinement) -> None:
    if confinement.loopback:
        raise OSError(errno.EPERM, "its processes talk by TCP, within a network of their own")
    landlock.restrict_network(confinement.reach[1] if confinement.reach else None)
    with socket.socket() as probe:
        _must_fail(lambda: probe.bind(("127.0.0.1", 0)))


def _landlock_scopes(_: Confinement) -> None:
    landlock.restrict_scopes()
    _must_fail(lambda: os.kill(os.getppid(), 0))


def _seccomp(confinement: Confinement) -> None:
    seccomp.install(
        reaches=confinement.reach is not None, loopback=confinement.loopback, gpu=confinement.gpu
    )
    _must_fail(lambda: socket.socket(socket.AF_UNIX).close())


def _must_fail(action: Callable[[], None]) -> None:
    try:
        action()
    except PermissionError:
        return
    raise OSError(errno.EINVAL, _LET_THROUGH)


_NAMESPACES = ("no_new_privileges", "user_namespace", "network_namespace", "ipc_namespace")
# In this order: namespaces before the rights to make them go, the filter of calls last.
_LAYERS: Mapping[ProtectionName, Callable[[Confinement], None]] = {
    "no_new_privileges": _no_new_privileges,
    "user_namespace": _namespace("user", kernel.CLONE_NEWUSER),
    "network_namespace": _namespace("net", kernel.CLONE_NEWNET),
    "ipc_namespace": _namespace("ipc", kernel.CLONE_NEWIPC),
    "capabilities": _capabilities,
    "memory_hidden": _memory_hidden,
    "memory_limit": _memory_limit,
    "process_limit": _process_limit,
    "landlock_files": _landlock_files,
    "landlock_network": _landlock_network,
    "landlock_scopes": _landlock_scopes,
    "seccomp": _seccomp,
}
assert set(_LAYERS) == set(MEANINGS) == set(get_args(ProtectionName))


def _tell(asked: str) -> None:
    """What `offered` runs."""
    given = json.loads(asked)
    given["read"], given["write"] = (tuple(map(Path, given[key])) for key in ("read", "write"))
    print(json.dumps([asdict(p) for p in confine(Confinement(**given))]))


if __name__ == "__main__":
    _tell(sys.argv[1])
