"""Golden: state that an earlier build left is read by this one, to the same values."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from silotune.events.schema import KINDS, kind_of
from tests.golden.make import GOLDEN, READERS, WRITERS, told_by
from tests.golden.read_runs import run_in
from tests.golden.registry import private_copy
from tests.whole_run import go_on

EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
KEPT = {path.name: path for path in GOLDEN.iterdir() if path.suffix != ".py"}
KEPT = {name: KEPT[name] for name in sorted(KEPT) if name not in {"expected.json", "__pycache__"}}
PARTS = [
    path.relative_to(GOLDEN).as_posix()
    for folder in KEPT.values()
    if folder.is_dir()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
]


def alike(one, other):
    """Equal; figures up to the rounding of another machine's arithmetic."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return type(one) is type(other) and one == other


def test_every_golden_file_has_a_reader_a_writer_and_an_expectation():
    assert set(KEPT) == set(READERS) == set(EXPECTED) == {*WRITERS, "certificate.json"}


@pytest.mark.parametrize("name", KEPT)
def test_what_an_earlier_build_wrote_is_read_to_the_same_values(tmp_path, name):
    told = told_by(name, KEPT[name], tmp_path)
    assert alike(told, EXPECTED[name]), (told, EXPECTED[name])


@pytest.mark.parametrize("part", PARTS)
def test_no_file_lies_there_unread(tmp_path, part):
    """Without it the folder is not read to the same values: the reader looks at each file."""
    name = Path(part).parts[0]

    def without(folder):
        (folder.parent / part).unlink()

    try:
        told = told_by(name, KEPT[name], tmp_path, change=without)
    except Exception:
        return
    assert not alike(told, EXPECTED[name])


def test_every_kind_of_event_of_then_is_one_of_now():
    kinds = {json.loads(line)["event"] for line in KEPT["events.jsonl"].read_text().splitlines()}
    assert kinds <= {kind_of(kind) for kind in KINDS}
    assert len(kinds) == 26


def test_a_run_that_an_earlier_build_stopped_goes_on_from_its_last_round_to_the_end(
    tmp_path, monkeypatch
):
    """Its own rounds stay; the last has as much noise as then, of another stream of the plan's seed."""
    folder = private_copy(KEPT["run_stopped"], tmp_path / "stopped")
    (folder / "base").symlink_to(KEPT["adapter"] / "base")
    monkeypatch.chdir(folder)
    directory = go_on(run_in(folder).root)
    whole = run_in(private_copy(KEPT["run_finished"], tmp_path / "finished"))
    assert directory.find_json("results.json") is not None
    assert [e["from_round"] for e in directory.events if e["event"] == "run_resumed"] == [2]
    assert directory.adapter_rounds() == whole.adapter_rounds() == [1, 2, 3]
    for number in (1, 2):
        for name, array in directory.load_adapter(number).items():
            np.testing.assert_array_equal(array, whole.load_adapter(number)[name])
    ends = [_flat(run.load_adapter(3)) for run in (directory, whole)]
    steps = [np.linalg.norm(end - _flat(whole.load_adapter(2))) for end in ends]
    assert steps[0] == pytest.approx(steps[1], rel=0.2)
    assert 0 < np.linalg.norm(ends[0] - ends[1]) < 1.7 * steps[1]


def _flat(arrays):
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])
