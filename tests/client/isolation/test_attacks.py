"""A confined process is attacked from inside: what is refused, and by which layer alone.

The table below is the one of docs/security.md. Each attack works where nothing confines it, which shows
that it is one; then it is tried with all layers, and with each layer alone that the table names. The
process is an ordinary account's, as a site's daemon is; then once more that of whoever runs the tests.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from silotune.client.isolation.confinement import MEANINGS
from tests.client.isolation.attacks import ATTACKS

SCRIPT = Path(__file__).parent / "attacks.py"
SECURITY = Path(__file__).parents[3] / "docs" / "security.md"
# What an ordinary account can't do anyway; as root it is an attack.
ROOTS_ALONE = {"socket packet", "userfaultfd", "mount", "terminal"}
ANOTHER = ("user_namespace", "landlock_files", "landlock_network", "landlock_scopes", "seccomp")
REFUSED_BY = {
    "Open a socket of its own": (
        ("socket inet", "socket inet6", "socket unix", "socket netlink"),
        ("seccomp",),
    ),
    "Open a raw socket": (("socket packet",), ("user_namespace", "capabilities", "seccomp")),
    "Connect to the network or to this machine by TCP": (
        ("connect", "connect inet6"),
        ("network_namespace", "landlock_network", "seccomp"),
    ),
    "Connect an inherited TCP socket": (("connect inherited",), ("landlock_network", "seccomp")),
    "Send from an inherited socket to an address, TCP fast open included": (
        ("connect fast open", "send inherited", "send message inherited"),
        ("seccomp",),
    ),
    "Connect to a Unix socket in a folder": (("connect unix",), ("seccomp",)),
    "Connect to an abstract Unix socket": (
        ("connect abstract",),
        ("network_namespace", "landlock_scopes", "seccomp"),
    ),
    "Read keys, ledger, another dataset; also through `/proc` or an inherited folder": (
        ("read keys", "read keys by proc", "read keys by folder", "read other dataset"),
        ("landlock_files",),
    ),
    "Read another process's command line": (("read cmdline",), ("landlock_files",)),
    "Read another process's environment or memory in `/proc`": (
        ("read environ", "read maps", "read memory"),
        ANOTHER[:-1],
    ),
    "Trace another process, read its memory or descriptors by a call": (
        ("read memory by call", "trace", "take descriptor", "compare"),
        ANOTHER,
    ),
    "Signal another process, also as the owner of a socket": (
        ("signal", "signal thread", "signal by descriptor", "signal by socket"),
        ("landlock_scopes", "seccomp"),
    ),
    "Change another process's limits, processors or priority": (
        ("limit", "affinity", "priority"),
        ("seccomp",),
    ),
    "Write, shorten, replace or move anything outside its scratch folder": (
        (
            "write outside", "write model", "truncate model", "remove model", "replace model",
            "move model", "write bytecode",
        ),
        ("landlock_files",),
    ),
    "Change modes, owners, times or attributes of files": (
        ("mode of key", "owner of key", "times of model", "attribute of model"),
        ("seccomp",),
    ),
    "Make links, pipes or socket files in its scratch folder": (
        ("hard link", "symbolic link", "named pipe", "socket file"),
        ("landlock_files", "seccomp"),
    ),
    "Start a shell or any program, also from memory": (
        ("shell", "spawn", "execute memory"),
        ("landlock_files", "seccomp"),
    ),
    "Start processes": (("fork", "vfork", "clone3"), ("seccomp",)),
    "Start threads without end": (("threads",), ("memory_limit", "process_limit")),
    "Take more memory than its limit": (("memory",), ("memory_limit",)),
    "Take memory that the limit doesn't count": (
        ("memory shared", "memory of stacks", "memory file", "memory sysv"),
        ("seccomp",),
    ),
    "Fill `/dev/shm` or map `/dev/zero`": (
        ("memory dev shm", "memory dev zero"),
        ("landlock_files",),
    ),
    "Use io_uring, keyrings, new namespaces or 32-bit calls": (
        ("io_uring", "keyring", "namespaces", "32 bits"),
        ("seccomp",),
    ),
    "As root: mount, handle page faults, type into a terminal": (
        ("userfaultfd", "mount", "terminal"),
        ("user_namespace", "capabilities", "seccomp"),
    ),
    "Leave its memory in a core file": (("core",), ("memory_hidden",)),
}  # fmt: skip
ALONE = [(layer, a) for attacks, layers in REFUSED_BY.values() for a in attacks for layer in layers]


def outcomes(folder, cases, *options):
    """How each case ended, by (layers, attack)."""
    asked = [[list(layers) if layers is not None else None, attack] for layers, attack in cases]
    ran = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), *options],
        input=json.dumps(asked), cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return dict(zip(cases, json.loads(ran.stdout), strict=True))


def with_what_it_needs(layer):
    """Two layers are an ordinary account's only in a user namespace of its own."""
    needs = layer in {"network_namespace", "process_limit"}
    return ("user_namespace", layer) if needs else (layer,)


@pytest.fixture(scope="module")
def as_an_account(tmp_path_factory):
    cases = [((), attack) for attack in ATTACKS] + [(None, attack) for attack in ATTACKS]
    cases += [(with_what_it_needs(layer), attack) for layer, attack in ALONE if attack != "threads"]
    return outcomes(tmp_path_factory.mktemp("account"), cases, "--ordinary")


@pytest.fixture(scope="module")
def as_whoever_runs_this(tmp_path_factory):
    cases = [((), attack) for attack in ROOTS_ALONE] + [(None, attack) for attack in ATTACKS]
    cases += [(with_what_it_needs(layer), attack) for layer, attack in ALONE if attack == "threads"]
    return outcomes(tmp_path_factory.mktemp("whoever"), cases)


def test_the_table_has_every_attack():
    told = [attack for attacks, _ in REFUSED_BY.values() for attack in attacks]
    assert sorted(told) == sorted(ATTACKS)


def test_each_attack_works_where_nothing_confines_it(as_an_account, as_whoever_runs_this):
    worked = {attack for attack in ATTACKS if as_an_account[(), attack] == "done"}
    assert worked == set(ATTACKS) - ROOTS_ALONE
    worked = {attack for attack in ROOTS_ALONE if as_whoever_runs_this[(), attack] == "done"}
    assert worked == (ROOTS_ALONE if os.getuid() == 0 else set())


def test_a_confined_process_is_refused_each(as_an_account, as_whoever_runs_this):
    for found in (as_an_account, as_whoever_runs_this):
        ended = {attack: found[None, attack] for attack in ATTACKS}
        assert {a: e for a, e in ended.items() if not e.startswith("refused")} == {}


def test_processes_that_share_a_network_of_their_own_have_sockets_in_it_and_no_more(tmp_path):
    """They reach nobody, unless a socket of the machine's network had been left open for them."""
    found = outcomes(tmp_path, [(None, attack) for attack in ATTACKS], "--ordinary", "--loopback")
    own = {"socket inet", "socket inet6", "socket netlink"}
    inherited = {
        "connect fast open",
        "send inherited",
        "send message inherited",
        "connect inherited",
    }
    assert {attack for (_, attack), ended in found.items() if ended == "done"} <= own | inherited
    assert {found[None, attack] for attack in ("connect", "connect inet6")} <= {
        "refused ECONNREFUSED", "refused ENETUNREACH", "refused EADDRNOTAVAIL",
    }  # fmt: skip


def test_where_namespaces_are_refused_as_in_a_container_the_other_layers_do(tmp_path):
    cases = [(None, attack) for attack in ATTACKS] + [(("user_namespace",), "read environ")]
    found = outcomes(tmp_path, cases, "--ordinary", "--no-namespaces")
    assert found.pop((("user_namespace",), "read environ")) == "done"
    assert {key: ended for key, ended in found.items() if not ended.startswith("refused")} == {}


def test_without_landlock_what_is_left_open_is_what_the_table_gives_to_it_alone(tmp_path):
    layers = tuple(name for name in MEANINGS if not name.startswith("landlock"))
    found = outcomes(tmp_path, [(layers, attack) for attack in ATTACKS], "--ordinary")
    alone = {
        attack
        for attacks, by in REFUSED_BY.values()
        for attack in attacks
        if all(name.startswith("landlock") for name in by)
    }
    assert {attack for (_, attack), ended in found.items() if ended == "done"} == alone


def test_a_process_that_reads_a_database_reaches_that_port_and_no_other(tmp_path):
    found = outcomes(tmp_path, [(None, attack) for attack in ATTACKS], "--ordinary", "--reach")
    done = {attack for (_, attack), ended in found.items() if ended == "done"}
    assert done == {"socket inet", "socket inet6", "connect", "connect inherited"}
    assert found[None, "connect inet6"] == "refused EACCES"  # another port


@pytest.mark.parametrize("layer", [name for name in MEANINGS if name in dict(ALONE)])
def test_the_layer_alone_refuses_what_the_table_says(layer, as_an_account, as_whoever_runs_this):
    found = as_an_account | {k: v for k, v in as_whoever_runs_this.items() if k[0]}
    own = [attack for name, attack in ALONE if name == layer]
    ended = {attack: found[with_what_it_needs(layer), attack] for attack in own}
    assert own
    assert {a: e for a, e in ended.items() if not e.startswith("refused")} == {}


def test_the_page_has_the_same_table():
    rows = re.findall(r"^\| ([A-Z][^|]+) \| (`[^|]+`) \|$", SECURITY.read_text(), re.MULTILINE)
    said = {words: tuple(re.findall("`([^`]+)`", layers)) for words, layers in rows}
    assert said == {words: layers for words, (_, layers) in REFUSED_BY.items()}
