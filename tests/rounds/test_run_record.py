"""A run directory is read whole, and one that was edited is refused."""

import pytest

from silotune.errors import RunDirectoryInvalid
from silotune.rounds.run_directory import read_record
from tests.simulation.synthetic_run import Synthetic


def test_a_whole_directory_is_read(tmp_path):
    record = read_record(Synthetic().write(tmp_path))
    assert record.methods[0].key == "federated"
    assert len(record.sites) == 7
    assert record.plan["plan"]["name"] == "hospitals"
    assert record.history.finished
    assert len(record.history.finished_rounds) == record.history.planned


def test_an_event_that_is_not_of_its_kind_is_refused_with_the_file(tmp_path):
    folder = Synthetic().write(tmp_path)
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"time":1.0,"event":"round_finished","round":"four"}\n')
    with pytest.raises(RunDirectoryInvalid, match=r"events\.jsonl has an event of another shape"):
        read_record(folder)
