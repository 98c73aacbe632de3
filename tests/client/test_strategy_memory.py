"""What a site remembers: sealed, by round, and enough of it to repeat the last one."""

import numpy as np
import pytest

from silotune.client.run_files import MEMORY, ProcessMemory, RunFiles, SealedMemory
from silotune.trust.vault import Vault

SECRET = np.arange(1000, 1064, dtype=np.float32)


@pytest.fixture(params=["process", "sealed"])
def memory(request, tmp_path):
    if request.param == "process":
        return ProcessMemory()
    return Released(files_in(tmp_path / "state"))


def files_in(state, run="run"):
    return RunFiles(state, MEMORY, run=run, vault=Vault(state))


class Released(SealedMemory):
    """A sealed memory whose rounds are all released, each with an update of its own."""

    def __init__(self, files):
        super().__init__(files, released=lambda number: f"{number:064x}")

    def keep(self, server_round, arrays):
        super().keep(server_round, arrays)
        self.promote(server_round, f"{server_round:064x}")


def test_what_a_round_left_is_read_only_if_its_own_update_was_released(tmp_path):
    released = {}

    def opened():
        return SealedMemory(files_in(tmp_path), released=released.get)

    memory = opened()
    memory.keep(1, {"kept": SECRET})
    assert memory.recall(before=2) is None  # trained, not released
    memory.promote(1, "a" * 64)
    assert memory.recall(before=2) is None  # on the disk, and the release did not come to be
    memory.keep(1, {"kept": SECRET + 1})
    memory.promote(1, "b" * 64)
    released[1] = "b" * 64
    for reader in (memory, opened()):
        assert reader.recall(before=2)[1]["kept"].tobytes() == (SECRET + 1).tobytes()
    assert len(list((tmp_path / "memory").iterdir())) == 1


def test_the_newest_round_before_one_is_recalled(memory):
    assert memory.recall(before=1) is None
    for number in (1, 2, 3):
        memory.keep(number, {"kept": SECRET + number, "count": np.array([number])})
    for before, want in ((3, 2), (4, 3), (9, 3)):
        found, arrays = memory.recall(before=before)
        assert found == want
        assert arrays["kept"].tobytes() == (SECRET + want).tobytes()
        assert arrays["count"].tolist() == [want]
    assert memory.recall(before=2) is None  # older than anybody can ask for again


def test_a_round_that_is_done_again_replaces_what_it_kept(memory):
    memory.keep(1, {"kept": SECRET})
    memory.keep(1, {"kept": SECRET + 5})
    assert memory.recall(before=2)[1]["kept"][0] == SECRET[0] + 5


def test_what_is_kept_is_not_the_callers_array(memory):
    array = SECRET.copy()
    memory.keep(1, {"kept": array})
    array[:] = 0
    assert memory.recall(before=2)[1]["kept"][3] == SECRET[3]


def test_files_are_sealed_private_and_found_again_by_another_process(tmp_path):
    Released(files_in(tmp_path)).keep(7, {"kept": SECRET})
    (path,) = (tmp_path / "memory").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert SECRET[:4].tobytes() not in path.read_bytes()
    again = Released(files_in(tmp_path))
    assert again.recall(before=8)[1]["kept"].tobytes() == SECRET.tobytes()


def test_runs_do_not_see_each_others_memory(tmp_path):
    Released(files_in(tmp_path, "one")).keep(1, {"kept": SECRET})
    assert Released(files_in(tmp_path, "../two")).recall(before=9) is None
