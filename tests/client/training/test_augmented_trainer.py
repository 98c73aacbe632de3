"""Versions of texts are made in the trainer's own process, which may read the list of synonyms."""

import pytest

from silotune.client.site_run import SiteRun
from silotune.client.training.bounds import table_of
from silotune.client.training.launcher import Launcher
from silotune.client.training.process import TrainerProcesses
from silotune.client.troubles import latest_troubles
from silotune.models.layout import initial_adapter
from tests.federation import PRIVATE, write_federation


def sent(part, number=1):
    start = initial_adapter(part.layout, part.plan)
    return part.train(start, number).array_records["update"]["flat"].numpy().tobytes()


@pytest.mark.slow
def test_a_confined_trainer_augments_as_a_simulation_does(tmp_path, bert_folder):
    settings = {key.replace(".", "__"): value for key, value in PRIVATE.items()}
    made = write_federation(tmp_path / "sites", bert_folder, names=("alpha",), **settings)
    plain = made.runs(state="plain")[0]
    plain.join()
    folder = tmp_path / "sites" / "alpha"
    (folder / "synonyms.csv").write_text("left, sinister\nright, dexter\n")
    config = folder / "site.toml"
    config.write_text(
        f"{config.read_text()}[datasets.notes.augmentation]\ncopies = 3\n"
        'synonyms = "synonyms.csv"\nreplace = 0.9\n'
    )
    (site,) = made.sites
    table = table_of(site, scratch=tmp_path / "scratch", models=[str(bert_folder)])
    launcher = Launcher(table)
    processes = TrainerProcesses(site, launcher=launcher)
    state = tmp_path / "state"
    part = SiteRun(site, state=state, plan=made.plan, run="r", models=processes)
    here = made.runs(state="here")[0]
    try:
        for each in (part, here):
            each.join()
        assert sent(part) == sent(here) != sent(plain)
        assert latest_troubles(state) == []
    finally:
        launcher.close()
