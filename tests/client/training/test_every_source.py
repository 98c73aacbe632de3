"""A confined trainer reads the records of every format, and tells the daemon which they were."""

from __future__ import annotations

import shutil

import pytest

from silotune.client.site_run import SiteRun
from silotune.client.training.bounds import table_of
from silotune.client.training.launcher import Launcher
from silotune.client.training.process import TrainerProcesses
from silotune.client.troubles import latest_troubles
from silotune.data.declared import new_secret
from silotune.data.records import load_records
from silotune.data.site import SiteConfig
from silotune.models.layout import initial_adapter
from tests.data.example_tables import FOLDER
from tests.federation import write_federation

SITE = SiteConfig.load(FOLDER / "site.toml")
SECRET = new_secret()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    place = tmp_path_factory.mktemp("tables") / "letters"
    shutil.copytree(FOLDER, place)
    config = place / "site.toml"
    config.write_text(config.read_text() + '[resources]\ndevice = "cpu"\nthreads = 1\n')
    return SiteConfig.load(config)


@pytest.fixture(scope="module")
def launcher(site, tmp_path_factory, bert_folder):
    scratch = tmp_path_factory.mktemp("scratch") / "trainers"
    launcher = Launcher(table_of(site, scratch=scratch, models=[str(bert_folder)]))
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def plan(tmp_path_factory, bert_folder):
    made = write_federation(tmp_path_factory.mktemp("plan"), bert_folder, names=("alpha",))
    asked = {
        "model.labels": ["acute", "chronic"],
        "privacy.unit": "patient",
        "privacy.max_records_per_unit": 3,
        "privacy.rate": 0.5,
        "rounds.min_sites": 1,
    }
    return made.plan.override(asked)


@pytest.mark.slow
@pytest.mark.parametrize("name", SITE.datasets)
def test_a_trainer_reads_every_format_and_the_daemon_logs_its_fingerprint(
    site, launcher, plan, name, tmp_path
):
    told = []
    plan = plan.override({"data.dataset": name})
    part = SiteRun(
        site,
        state=tmp_path / "state",
        plan=plan,
        run=name,
        models=TrainerProcesses(site, launcher=launcher),
        secret=SECRET,
        on_records=told.append,
    )
    part.join()
    part.train(initial_adapter(part.layout, plan), 1)
    assert latest_troubles(tmp_path / "state") == []
    here = load_records(site, plan, roles={"text", "label"}, secret=SECRET)
    assert [found.fingerprint for found in told] == [here.fingerprint(SECRET)]
    assert here.rows_left_out == 2
