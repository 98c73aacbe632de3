"""Processes that start in milliseconds: forked from a server that has imported the product once.

For tests in which a process is the means, not the claim. That a worker starts from nothing is shown by
tests/simulation/test_grid.py and test_pool.py and, through the command line, by test_run.py there.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
from multiprocessing import reduction
from types import SimpleNamespace
from unittest.mock import patch

from silotune.simulation import baselines, pool

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["silotune.simulation.baselines", "silotune.simulation.program"])


def start_forkserver():
    """Have the server up; one child was forked from it."""
    first = FORKS.Process(target=len, args=("",))
    first.start()
    first.join()


@contextlib.contextmanager
def forked_workers():
    """A simulation's processes are forked while this lasts."""
    start_forkserver()
    processes = SimpleNamespace(Popen=Forked, TimeoutExpired=subprocess.TimeoutExpired)
    contexts = SimpleNamespace(get_context=lambda how: FORKS)
    with (
        patch.object(pool, "subprocess", processes),
        patch.object(baselines, "multiprocessing", contexts),
    ):
        yield


class _Descriptor:
    """A descriptor that a child of the server shall have too."""

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        return _received, (reduction.DupFd(self.number),)


def _received(duplicate):
    return duplicate.detach()


def _be(code, arguments, descriptors, environment):
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


class Forked:
    """As much of `subprocess.Popen` as a worker's link uses, for ``python -c CODE ARGUMENTS``."""

    def __init__(self, command, *, stdin, stdout, stderr, env, start_new_session):
        _, flag, code, *arguments = command
        assert flag == "-c" and start_new_session
        descriptors = [_Descriptor(number) for number in (stdin, stdout, stderr)]
        self._process = FORKS.Process(
            target=_be, args=(code, arguments, descriptors, env), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout)
        return self._process.exitcode

    def terminate(self):
        self._process.terminate()

    def kill(self):
        self._process.kill()
