"""What a site forces to the disk before anything leaves, and what a simulated one need not."""

import os
from pathlib import Path

import numpy as np
import pytest

from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.models.layout import initial_adapter
from silotune.privacy.ledger import Ledger
from tests.federation import CHOICES, PRIVATE, write_federation


def started(tmp_path, bert_folder, **settings):
    federation = write_federation(tmp_path, bert_folder)
    plan = federation.plan.override(PRIVATE)
    run = SiteRun(
        federation.sites[0],
        state=tmp_path / "s",
        plan=plan,
        run="r",
        models=ModelCache(CHOICES),
        **settings,
    )
    run.join()
    return run, initial_adapter(run.training.trainer.layout, plan)


@pytest.fixture
def synced(monkeypatch):
    """Files and folders that were forced to the disk, in order."""
    names, fsync = [], os.fsync

    def noted(descriptor):
        names.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return names


def test_reply_and_ledger_head_are_on_the_disk_before_an_update_leaves(
    tmp_path, bert_folder, synced
):
    run, adapter = started(tmp_path, bert_folder)
    synced.clear()
    run.train(adapter, 1)
    kinds = [name.rsplit("/", 1)[-1] for name in synced]
    charge = [".ledger.sqlite.head.tmp", "s"]
    assert kinds[:2] == charge  # before any record is touched
    assert kinds[2].endswith(".safetensors.tmp") and kinds[3] == "outbox"
    assert kinds[4:] == charge  # and which bytes it was for


def test_a_simulated_site_waits_for_no_disk_and_keeps_the_same_ledger(
    tmp_path, bert_folder, synced
):
    run, adapter = started(tmp_path, bert_folder, to_disk=False)
    synced.clear()
    first = run.train(adapter, 1)
    assert not synced
    again = run.train(adapter, 1)
    assert np.array_equal(
        first.array_records["update"]["flat"].numpy(), again.array_records["update"]["flat"].numpy()
    )
    other = Ledger(tmp_path / "s" / "ledger.sqlite", create=False)
    assert len(other.events("notes")) == 1
    other.verify()
