"""Workers start, are asked, die and are ended; the simulator knows of each and leaves none behind."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from grid_material import by_node, grid, messages, pull_all, reasons
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.errors import EnvironmentFault, ModelNotFound, SiteReportedError, WorkerDied
from silotune.simulation.pool import SiteSlot, spread


@pytest.fixture(autouse=True)
def no_process_is_left_behind():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before


# --- sharing out ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 3))
def test_no_worker_has_more_than_four_thirds_of_the_best_possible_load(weights, workers):
    shares = spread(weights, workers)
    assert sorted(itertools.chain(*shares)) == list(range(len(weights)))
    assert len(shares) == min(workers, len(weights))
    best = min(
        max(sum(w for w, k in zip(weights, plan, strict=True) if k == j) for j in range(workers))
        for plan in itertools.product(range(workers), repeat=len(weights))
    )
    heaviest = max(sum(weights[site] for site in share) for share in shares)
    assert heaviest <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9  # Graham's bound


# --- starting ---


@pytest.mark.parametrize("workers", [0, 1])
def test_what_kept_a_worker_from_starting_is_raised_here(workers, tmp_path):
    with grid(workers, factory="build_without_model", log_folder=tmp_path) as some:
        with pytest.raises(ModelNotFound, match="no folder 'minilm' here"):
            some.wait_until_ready()
        assert some.get_node_ids() == []


def test_a_bug_at_the_start_is_not_quoted(caplog):
    with grid(0, factory="build_with_a_bug") as inline:
        with pytest.raises(WorkerDied, match="ZeroDivisionError") as caught:
            inline.pull_messages([])
        assert "4711" not in str(caught.value)


def test_a_factory_that_is_not_there_is_named():
    with grid(0, factory="bild") as inline, pytest.raises(EnvironmentFault, match="bild"):
        inline.wait_until_ready()


def test_two_sites_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        grid(0, sites=[SiteSlot("eye"), SiteSlot("eye")])


# --- a worker dies ---


def test_a_dead_worker_is_raised_once_and_then_its_sites_give_errors():
    with grid(2) as some:
        some.wait_until_ready()
        dying, fine = messages([1], do="die") + messages([4]), messages([2, 3])
        lost, kept = some.push_messages(dying), some.push_messages(fine)
        deaths = []
        replies = by_node(pull_all(some, lost + kept, deaths=deaths))
        assert len(deaths) == 1
        assert "exited with 3; it played eye, bone" in str(deaths[0])
        assert reasons([replies[1], replies[4]]) == ["ST-604", "ST-604"]
        assert replies[2].has_content() and replies[3].has_content()
        assert some.get_node_ids() == [2, 3]
        assert reasons(some.send_and_receive(messages([4]))) == ["ST-604"]
        with pytest.raises(WorkerDied, match="bone"):
            some.inspect_all({}, {"x": np.zeros(1)}, ["bone"])


def test_a_worker_that_is_killed_says_so_to_whoever_waits():
    with grid(1) as some:
        worker = some.send_and_receive(messages([1]), timeout=120)[0].content["released"]["pid"]
        ids = some.push_messages(messages([1], **{"sleep-1": 60.0}))
        os.kill(worker, signal.SIGKILL)
        assert some.wait(20.0)
        with pytest.raises(WorkerDied, match="SIGKILL"):
            some.pull_messages(ids)


def test_a_worker_that_dies_before_it_is_ready_is_noticed():
    with (
        grid(1, factory="build_and_die") as some,
        pytest.raises(WorkerDied, match="exited with 7"),
    ):
        some.wait_until_ready()


def test_closing_ends_workers_in_the_middle_of_their_work():
    others = psutil.Process().children()
    some = grid(2)
    some.wait_until_ready()
    some.push_messages(messages([1, 2], **{"sleep-1": 60.0, "sleep-2": 60.0}))
    time.sleep(0.2)
    started = time.monotonic()
    some.close()
    some.close()
    assert time.monotonic() - started < 40  # not the 60 s of their work
    assert psutil.Process().children() == others


# --- the simulator's own view ---


@pytest.mark.parametrize("workers", [0, 2])
def test_inspection_asks_every_site_and_no_site_sees_anothers_arrays(workers):
    with grid(workers) as some:
        given = np.arange(3, dtype=np.float32)
        found = some.inspect_all({"split": "test"}, {"x": given})
        assert list(found) == ["eye", "heart", "skin", "bone"]
        assert [answer["site"] for answer, _ in found.values()] == [0, 1, 2, 3]
        assert {answer["word"] for answer, _ in found.values()} == {"x"}
        for site, (_, arrays) in enumerate(found.values()):
            np.testing.assert_array_equal(arrays["x"], np.float32([-1, 1, 2]) + site)
            assert arrays["x"].flags.writeable
        np.testing.assert_array_equal(given, [0, 1, 2])
        assert list(some.inspect_all({}, {"x": given}, ["bone", "heart"])) == ["heart", "bone"]


def test_an_inspection_that_fails_names_the_site_and_the_code_only(caplog):
    with grid(0) as inline:
        with pytest.raises(SiteReportedError, match=r"heart.*ST-401") as caught:
            inline.inspect_all({"fail": 1}, {"x": np.zeros(1)})
        assert "4711" not in str(caught.value)
        assert "patient 4711" in caplog.text


def test_an_inspection_of_a_site_that_is_not_there_is_refused():
    with grid(0) as inline, pytest.raises(ValueError, match="nose"):
        inline.inspect_all({}, {}, ["nose"])


def test_objects_do_not_travel_as_arrays():
    with grid(0) as inline, pytest.raises(TypeError, match="object"):
        inline.inspect_all({}, {"x": np.array([object()])})


def test_a_worker_that_dies_of_an_inspection_is_noticed():
    with grid(1) as some, pytest.raises(WorkerDied, match="exited with 9"):
        some.inspect_all({"die": 2}, {"x": np.zeros(1)})


# --- the simulator dies ---

_SCRIPT = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
    sys.path.insert(0, {here!r})
    from silotune.simulation.grid import SiteSlot, WorkerGrid
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
    import numpy as np, psutil
    with WorkerGrid("grid_programs:build", {{}}, [SiteSlot("eye")], workers=1) as grid:
        grid.wait_until_ready()
        arrays = ArrayRecord({{"flat": Array(np.ones(2, np.float32))}})
        content = RecordDict({{"arrays": arrays, "config": ConfigRecord({{"sleep-1": 60.0}})}})
        grid.push_messages([Message(content, 1, "train")])
        time.sleep(0.3)
        print(psutil.Process().children()[0].pid, flush=True)
        while True:
            grid.wait(60)
"""


@contextlib.contextmanager
def simulator():
    script = textwrap.dedent(_SCRIPT).format(here=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process, psutil.Process(int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def test_workers_die_with_the_simulator_even_in_the_middle_of_a_task():
    with simulator() as (process, worker):
        process.send_signal(signal.SIGKILL)
        assert psutil.wait_procs([worker], timeout=90)[0]


def test_ctrl_c_shows_one_traceback_the_simulators_and_ends_all():
    with simulator() as (process, worker):
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=90)
        assert errors.count("Traceback") == 1
        assert "KeyboardInterrupt" in errors
        assert psutil.wait_procs([worker], timeout=90)[0]
