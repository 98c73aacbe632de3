"""What this machine puts up, and what it says of it."""

import os
import subprocess
import sys
import threading

import pytest

from silotune.client.errors import IsolationMissing
from silotune.client.isolation.confinement import (
    MEANINGS,
    Confinement,
    Protection,
    confine,
    offered,
    require,
)


@pytest.fixture(scope="module")
def found():
    return {p.name: p for p in offered(Confinement(memory=2_000_000_000))}


def test_each_protection_is_in_force_or_says_why_not(found):
    assert set(found) == set(MEANINGS)
    assert all(bool(p.reason) != p.in_force for p in found.values())
    always = ("no_new_privileges", "capabilities", "memory_hidden", "memory_limit", "seccomp")
    assert all(found[name].in_force for name in always)
    limit = found["process_limit"]  # as root there is none, by the kernel
    assert limit.in_force if os.getuid() else "is root" in limit.reason


def test_where_memory_runs_out_a_confined_process_goes_first():
    program = (
        "from silotune.client.isolation.confinement import Confinement, confine\n"
        "confine(Confinement())\n"
        "print(open('/proc/self/oom_score_adj').read())"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(told.stdout) == 1000


def test_what_a_trainer_imports_before_it_is_confined_starts_no_thread():
    """NumPy's libraries start some where nothing in the environment holds them back."""
    program = (
        "import sys, silotune.client.training.child\n"
        "from silotune.client.isolation.kernel import threads\n"
        "print(threads(), {'numpy', 'torch', 'pyarrow'} & set(sys.modules))"
    )
    held = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    free = {name: value for name, value in os.environ.items() if name not in held}
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=free)
    assert told.stdout.split() == ["1", "set()"]


def test_a_process_with_other_threads_is_not_confined_in_part():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    with pytest.raises(RuntimeError, match="before it starts threads"):
        confine(Confinement())
    done.set()
    thread.join()


def test_what_is_required_and_not_in_force_is_named_with_its_reason():
    met = Protection(name="seccomp", in_force=True)
    missed = Protection(name="landlock_files", in_force=False, reason="the kernel has none")
    require([met, missed], ["seccomp"])
    with pytest.raises(IsolationMissing, match="landlock_files: the kernel has none"):
        require([met, missed], ["seccomp", "landlock_files"])
