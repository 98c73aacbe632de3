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


def test_a_run_that_an_earlier_build_stopped_goes_on_to_the_end_of_one_that_was_not(
    tmp_path, monkeypatch
):
    folder = private_copy(KEPT["run_stopped"], tmp_path / "stopped")
    (folder / "base").symlink_to(KEPT["adapter"] / "base")
    monkeypatch.chdir(folder)
    directory = go_on(run_in(folder).root)
    whole = run_in(private_copy(KEPT["run_finished"], tmp_path / "finished"))
    assert directory.find_json("results.json") is not None
    assert [e["from_round"] for e in directory.events if e["event"] == "run_resumed"] == [2]
    assert directory.adapter_rounds() == whole.adapter_rounds() == [1, 2, 3]
    for name, array in directory.load_adapter(3).items():
        np.testing.assert_allclose(array, whole.load_adapter(3)[name], rtol=1e-3, atol=1e-5)
