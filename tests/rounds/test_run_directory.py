"""The run directory: whole files or none, whole lines or none, one writer, readable at any time."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from silotune.errors import RunDirectoryInvalid
from silotune.rounds.run_directory import (
    JsonLines,
    RunDirectory,
    load_arrays,
    packed,
    write_atomically,
)


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory.create(tmp_path / "runs", "eyes", plan_toml="[plan]\n")
    directory.write_json("resolved.json", {"run": directory.name})
    return directory


def test_two_runs_started_in_one_second_get_two_folders(tmp_path):
    roots = {RunDirectory.create(tmp_path, "p", plan_toml="").root for _ in range(5)}
    assert len(roots) == 5


def test_the_plan_is_kept_byte_for_byte(tmp_path):
    text = "# é\n[plan]\nname = 'x'\n"
    run = RunDirectory.create(tmp_path, "p", plan_toml=text)
    assert run.plan_path.read_bytes() == text.encode()


def test_an_opened_run_is_the_one_that_was_created(run):
    run.append_event("run_started", run=run.name, sites=["a"], rounds=1)
    again = RunDirectory.open(run.root)
    assert again.events.read() == run.events.read()
    assert again.read_json("resolved.json") == {"run": run.name}


def test_a_folder_that_is_no_run_is_refused_and_the_missing_file_named(tmp_path):
    with pytest.raises(RunDirectoryInvalid, match="not a folder"):
        RunDirectory.open(tmp_path / "absent")
    (tmp_path / "plan.toml").write_text("")
    with pytest.raises(RunDirectoryInvalid, match=r"resolved\.json"):
        RunDirectory.open(tmp_path)


def test_opening_and_reading_write_nothing(run):
    (run.root / "events.jsonl").write_bytes(b'{"event":"run_started"}\n{"eve')
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    again = RunDirectory.open(run.root)
    assert len(again.events.read()) == 1
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before


@settings(deadline=None)  # other processes share this machine
@given(st.data())
def test_after_a_write_cut_anywhere_whole_lines_survive_and_new_ones_follow(data):
    rows = data.draw(
        st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=8)), min_size=1, max_size=5)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        for row in rows:
            JsonLines(path).append(row)
        content = path.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:cut])
        survivors = rows[: content[:cut].count(b"\n")]
        assert JsonLines(path).read() == survivors
        JsonLines(path).append({"after": "the crash"})
        assert JsonLines(path).read() == [*survivors, {"after": "the crash"}]


def test_a_broken_line_in_the_middle_is_an_error_and_not_silence(run):
    (run.root / "events.jsonl").write_bytes(b'{"a":1}\n{"b\n{"c":1}\n')
    with pytest.raises(RunDirectoryInvalid, match="line 2"):
        run.events.read()


def test_events_of_many_threads_never_mix(run):
    def write(worker):
        for number in range(50):
            run.append_event("site_replied", site="s" * 200, worker=worker, round=number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    seen = {(event["worker"], event["round"]) for event in run.events}
    assert seen == {(worker, number) for worker in range(8) for number in range(50)}


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from silotune.rounds.run_directory import RunDirectory
run = RunDirectory.open(Path(sys.argv[1]))
for number in range(1, 10**9):
    run.append_event("round_finished", round=number)
    run.save_checkpoint({"flat": np.full(50_000, number, np.float32)}, {"round": number})
    run.write_json("privacy.json", {"round": number, "padding": "x" * 100_000})
    print(number, flush=True)
"""


def test_sigkill_leaves_whole_files_no_older_than_what_was_confirmed(run):
    for delay in (0.0, 0.013, 0.031):
        child = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(run.root)], stdout=subprocess.PIPE, text=True
        )
        confirmed = int(child.stdout.readline())
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        confirmed = int(([str(confirmed), *child.stdout.read().split()])[-1])
        child.wait()
        child.stdout.close()
        arrays, state = RunDirectory.open(run.root).load_checkpoint()
        assert state["round"] >= confirmed
        np.testing.assert_array_equal(arrays["flat"], np.full(50_000, state["round"], np.float32))
        assert run.read_json("privacy.json")["round"] >= confirmed
        assert run.events.read()[-1]["round"] >= state["round"]


def test_a_write_that_breaks_off_before_it_is_durable_leaves_the_old_file(run, monkeypatch):
    run.write_json("privacy.json", {"round": 1})
    run.save_checkpoint({"flat": np.ones(3)}, {"round": 1})

    def broken(_descriptor):
        raise OSError("power is gone")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", broken)
        for write in (
            lambda: run.write_json("privacy.json", {"round": 2}),
            lambda: run.save_checkpoint({"flat": np.zeros(3)}, {"round": 2}),
        ):
            with pytest.raises(OSError, match="power"):
                write()
    assert run.read_json("privacy.json") == {"round": 1}
    assert run.load_checkpoint()[1] == {"round": 1}


@settings(deadline=None)  # other processes share this machine
@given(
    st.dictionaries(
        st.from_regex(r"[a-z.]{1,12}", fullmatch=True),
        st.tuples(
            st.lists(st.integers(0, 4), max_size=3),
            st.sampled_from(["f4", "f8", "i8", "u4", "?"]),
            st.booleans(),
        ),
        max_size=4,
    )
)
def test_arrays_come_back_bit_for_bit(specs):
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (shape, dtype, strided) in specs.items():
        array = (rng.normal(size=shape) * 100).astype(dtype)
        arrays[name] = array.T if strided else array
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_atomically(path, packed(arrays, {"round": 3, "nested": {"b": [1, None]}}))
        found, state = load_arrays(path)
        independent = load_file(path)
    assert state == {"round": 3, "nested": {"b": [1, None]}}
    assert found.keys() == arrays.keys() == independent.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        np.testing.assert_array_equal(independent[name], array)


def test_equal_states_give_equal_files_whatever_the_order(tmp_path):
    a, b = np.arange(3.0), np.arange(4.0)
    write_atomically(tmp_path / "1", packed({"a": a, "b": b}, {"x": 1, "y": 2}))
    write_atomically(tmp_path / "2", packed({"b": b, "a": a}, {"y": 2, "x": 1}))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_adapters_of_rounds_are_found_in_order(run):
    for number in (2, 10, 1):
        run.save_adapter(number, {"flat": np.full(3, number, np.float32)})
    assert run.adapter_rounds() == [1, 2, 10]
    np.testing.assert_array_equal(run.load_adapter(10)["flat"], np.full(3, 10, np.float32))
    with pytest.raises(RunDirectoryInvalid):
        run.load_adapter(3)


def test_a_damaged_array_file_is_an_error_with_a_code(run):
    run.save_adapter(1, {"flat": np.zeros(100, np.float32)})
    path = run.adapter_of_round(1)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(RunDirectoryInvalid, match="round-0001"):
        run.load_adapter(1)


def test_no_checkpoint_before_the_first_round(run):
    assert run.load_checkpoint() is None


def test_numbers_json_lacks_become_null_and_numpy_becomes_plain(run):
    value = {"nan": float("nan"), "inf": np.float32("inf"), "n": np.int64(3), "a": np.eye(2)}
    run.write_json("x.json", value)
    text = (run.root / "x.json").read_text()
    assert json.loads(text) == {"nan": None, "inf": None, "n": 3, "a": [[1.0, 0.0], [0.0, 1.0]]}


def test_an_absent_fact_is_none_or_an_error_as_asked(run):
    assert run.find_json("privacy.json") is None
    with pytest.raises(RunDirectoryInvalid, match=r"privacy\.json"):
        run.read_json("privacy.json")
    (run.root / "privacy.json").write_text("[1]")
    with pytest.raises(RunDirectoryInvalid):
        run.find_json("privacy.json")


def test_a_sites_folder_is_for_its_owner_only(run):
    assert stat.S_IMODE(run.site("Eye & ENT").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "a\0b"])
def test_a_hostile_site_name_can_not_leave_the_run(run, name):
    with pytest.raises(RunDirectoryInvalid):
        run.site(name)
