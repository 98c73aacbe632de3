"""A confined trainer opens the images of its dataset, and nothing beside their folder."""

from __future__ import annotations

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
from tests.image_material import PRIVATE, image_plan, write_image_model, write_image_site

SECRET = new_secret()


@pytest.mark.slow
def test_a_round_on_images_in_a_confined_trainer(tmp_path):
    """One image is a link out of the folder: it is left out, as in a process that could follow it."""
    base = write_image_model(tmp_path / "vit", "vit")
    config = write_image_site(tmp_path / "north", base=base, number=24, more="out.png,yes\n")
    (tmp_path / "out.png").write_bytes((config.parent / "scans" / "000.png").read_bytes())
    (config.parent / "scans" / "out.png").symlink_to(tmp_path / "out.png")
    config.write_text(config.read_text() + '[resources]\ndevice = "cpu"\nthreads = 1\n')
    site = SiteConfig.load(config)
    plan = image_plan(base, **PRIVATE).override(
        {"privacy.batch": None, "privacy.rate": 0.9, "plan.seed": None}
    )
    told = []
    scratch = tmp_path / "trainers"
    scratch.mkdir()
    launcher = Launcher(table_of(site, scratch=scratch, models=[str(base)]))
    try:
        part = SiteRun(
            site,
            state=tmp_path / "state",
            plan=plan,
            run="images",
            models=TrainerProcesses(site, launcher=launcher),
            secret=SECRET,
            on_records=told.append,
        )
        part.join()
        part.train(initial_adapter(part.layout, plan), 1)
    finally:
        launcher.close()
    assert latest_troubles(tmp_path / "state") == []
    here = load_records(site, plan, roles={"image", "label"}, secret=SECRET)
    assert [found.fingerprint for found in told] == [here.fingerprint(SECRET)]
    assert (len(here), here.rows_left_out) == (24, 1)
