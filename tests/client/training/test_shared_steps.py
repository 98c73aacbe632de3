"""`resources.devices`: a site's trainer is several processes, and its rounds are those of one."""

import time

import numpy as np
import psutil
import pytest

from silotune.client.site_run import SiteRun
from silotune.client.training.bounds import table_of
from silotune.client.training.launcher import Launcher
from silotune.client.training.process import TrainerProcesses
from silotune.client.troubles import latest_troubles
from silotune.models.layout import initial_adapter
from tests.federation import PRIVATE, write_federation


@pytest.fixture
def shared(tmp_path, bert_folder):
    """A part in a run whose trainer is two processes, the same part in this process, a launcher."""
    settings = {key.replace(".", "__"): value for key, value in PRIVATE.items()}
    made = write_federation(tmp_path / "sites", bert_folder, names=("alpha",), **settings)
    config = tmp_path / "sites" / "alpha" / "site.toml"
    config.write_text(
        config.read_text() + '[resources]\ndevice = "cpu"\ndevices = 2\nthreads = 2\n'
    )
    site = made.sites[0]
    table = table_of(site, scratch=tmp_path / "scratch", models=[str(bert_folder)])
    launcher = Launcher(table)
    processes = TrainerProcesses(site, launcher=launcher)
    part = SiteRun(site, state=tmp_path / "state", plan=made.plan, run="r", models=processes)
    alone = made.runs()[0]
    for each in (part, alone):
        each.join()
    yield part, alone, launcher, tmp_path / "state"
    launcher.close()


def sent(part, number):
    start = initial_adapter(part.layout, part.plan)
    return part.train(start, number).array_records["update"]["flat"].numpy()


def trainers(launcher):
    """The processes that train, each with its parent."""
    found = psutil.Process(launcher.pid).children(recursive=True)
    return [process for process in found if process.parent().pid != launcher.pid]


@pytest.mark.slow
def test_a_trainer_of_two_processes_answers_as_one_and_a_death_of_one_is_a_trainers(shared):
    part, alone, launcher, state = shared
    for number in (1, 3):  # of the head alone, and of the adapter too
        np.testing.assert_allclose(sent(part, number), sent(alone, number), rtol=0, atol=1e-6)
    second = trainers(launcher)
    assert len(second) == 1
    second[0].kill()
    sent(part, 4)  # noise alone, as after any trainer's death
    told = [trouble["error"] for trouble in latest_troubles(state)]
    assert told == ["ST-751"]
    np.testing.assert_allclose(sent(part, 5), sent(alone, 5), rtol=0, atol=1e-6)
    launcher.close()
    ends = time.monotonic() + 10
    while any(process.is_running() for process in second) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not [process for process in second if process.is_running()]
