"""One whole simulation that several test modules look at, and what they compare it with."""

from unittest.mock import patch

import psutil
import pytest
from safetensors.numpy import load_file

from silotune.simulation import run
from silotune.simulation.grid import WorkerGrid
from silotune.simulation.run import Settings
from tests.federation import PRIVATE, write_federation
from tests.forked import forked_workers, start_forkserver


def final(directory):
    arrays = load_file(directory.adapter_of_round(5))
    return {name: array.tobytes() for name, array in arrays.items()}


def play(federation, name, *, listener=lambda event: None, settings=None, **overrides):
    """Simulate; without settings in this process: no worker has to start."""
    with forked_workers() if settings else patch.object(run, "WorkerGrid", in_this_process):
        return run.simulate(
            federation.plan_path,
            runs=federation.folder / name,
            settings=settings or Settings(workers=1),
            listener=listener,
            overrides={**PRIVATE, **overrides},
        )


def play_plan(path, *, runs):
    """Simulate a plan's file as it is, in this process."""
    with patch.object(run, "WorkerGrid", in_this_process):
        return run.simulate(
            path, runs=runs, settings=Settings(workers=1), listener=lambda event: None
        )


def go_on(path):
    """Resume a run in this process."""
    with patch.object(run, "WorkerGrid", in_this_process):
        return run.resume(path, settings=Settings(workers=1), listener=lambda event: None)


def in_this_process(*args, **options):
    return WorkerGrid(*args, **{**options, "workers": 0})


@pytest.fixture(scope="session")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("federation"), bert_folder)


@pytest.fixture(scope="session")
def whole(federation):
    """One uninterrupted seeded run with two workers and baselines."""
    start_forkserver()
    before, seen = set(psutil.Process().children(recursive=True)), []
    directory = play(
        federation, "whole", listener=seen.append, settings=Settings(workers=2, baselines=True)
    )
    left = set(psutil.Process().children(recursive=True)) - before
    # Python's own resource tracker stays until this process ends, once any pool was used.
    assert not [p for p in left if "resource_tracker" not in " ".join(p.cmdline())]
    return directory, seen
