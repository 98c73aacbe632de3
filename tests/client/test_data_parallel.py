"""Several processes share a site's steps: the same sums, one noise, whole units; and their faults."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from silotune.client.data_parallel import Ranks, processes_for
from silotune.data.site import ResourcesConfig
from tests.client.ranked_training import CLIP, influence, rounds

SCRIPT = Path(__file__).with_name("ranked_training.py")
CASES = ("sums", "steps", "plain")


@pytest.fixture(scope="module")
def ran(tmp_path_factory, bert_folder):
    """Two confined processes that talk by Gloo: the folder of what they left, how the first ended."""
    folder = tmp_path_factory.mktemp("ranks")
    # By -P the script's folder is no place of modules, and a library has a package "tests", too.
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(SCRIPT), str(folder), str(bert_folder)]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    return folder, ended


@pytest.mark.parametrize("case", CASES)
def test_two_processes_come_to_what_one_does(ran, bert_folder, case):
    """With a seed the noise is known too: added twice, or by each, the sums would be far apart."""
    folder, ended = ran
    assert (folder / f"{case}-1.npy").exists(), ended.stderr
    alone = rounds(Ranks(), case, bert_folder)
    first, second = (np.load(folder / f"{case}-{rank}.npy") for rank in (0, 1))
    assert np.abs(alone).max() > 0.01
    np.testing.assert_allclose(first, alone, rtol=0, atol=1e-6)
    assert first.tobytes() == second.tobytes()


def test_a_unit_that_fills_a_micro_batch_moves_the_sum_by_its_clip(ran, bert_folder):
    whole = np.hypot(CLIP, CLIP)  # of head and adapter together
    for moved in (np.load(ran[0] / "influence-0.npy"), influence(Ranks(), bert_folder)):
        assert 0.5 * whole < np.linalg.norm(moved) < whole + 0.05


def test_both_are_confined_and_only_their_own_network_has_sockets(ran):
    for rank in (0, 1):
        layers = set((ran[0] / f"layers-{rank}").read_text().split())
        wanted = {"network_namespace", "landlock_files", "landlock_scopes", "seccomp"}
        assert layers >= wanted
        assert "landlock_network" not in layers


def test_a_failure_in_one_is_a_failure_of_the_round_and_not_of_the_next(ran):
    first, second = (json.loads((ran[0] / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert second["fault"] == ["KeyError: 'of one process'", "done"]
    assert first["fault"] == [
        "SelfCheckFailed: ST-404 another process of the trainer failed; its log says in what",
        "done",
    ]


def test_processes_that_read_different_records_train_nothing(ran):
    first, second = (json.loads((ran[0] / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert all("have read different records" in told for told in second["other records"])
    assert all("another process of the trainer failed" in told for told in first["other records"])


def test_if_one_dies_the_other_ends_at_once(ran):
    _, ended = ran
    assert ended.returncode == 71
    assert "a process of the trainer is gone" in ended.stderr


@pytest.mark.parametrize(
    "settings, gpus, visible, processes",
    [
        ({}, 0, None, 1),
        ({}, 4, None, 4),
        ({}, 4, "2,3", 2),
        ({}, 4, "", 1),
        ({"devices": 3}, 4, None, 3),
        ({"devices": 8}, 4, None, 4),
        ({"device": "cuda"}, 2, None, 2),
        ({"device": "cuda:1"}, 4, None, 1),
        ({"device": "cpu"}, 4, None, 1),
        ({"device": "cpu", "devices": 2}, 4, None, 2),
    ],
)
def test_a_process_for_each_gpu_that_may_be_used(monkeypatch, settings, gpus, visible, processes):
    names = [f"nvidia{n}" for n in range(gpus)] + ["nvidiactl", "nvidia-uvm", "nvidia-caps"]
    monkeypatch.setattr(Path, "glob", lambda place, _: [place / name for name in names])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert processes_for(ResourcesConfig(**settings)) == processes


def test_one_chosen_gpu_and_several_are_a_contradiction():
    with pytest.raises(ValidationError, match="devices has no meaning where device is 'cuda:1'"):
        ResourcesConfig(device="cuda:1", devices=2)


def test_micro_batches_are_small_enough_for_each_and_hold_a_unit():
    alone, four = Ranks(), Ranks(size=4)
    assert alone.micro_batch(64, expected=40.0, unit=3) == 64
    assert four.micro_batch(64, expected=40.0, unit=3) == 10
    assert four.micro_batch(64, expected=40.0, unit=25) == 25
    assert four.micro_batch(8, expected=400.0, unit=3) == 8
