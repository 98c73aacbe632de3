"""What people can have of a coordinator's statistics run: its figures, and not the sums behind them."""

import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.errors import FileNotOffered
from silotune.models.layout import statistics_layout
from silotune.plan.plan import Plan
from silotune.report.statistics import read
from silotune.server.store.database import Store
from silotune.server.store.runs import Runs, RunWriter, StoredRuns
from silotune.trust.signed import SignedPlan
from silotune.trust.vault import Vault
from tests.golden.registry import GOLDEN
from tests.server.coordinator_material import store_url


@pytest.fixture
def store(tmp_path):
    made = Store(store_url(tmp_path), vault=Vault(tmp_path / "keys"))
    yield made
    made.close()


@pytest.fixture
def record(store):
    """A run whose one round is saved, and whose figures are not told yet."""
    plan = Plan.load(GOLDEN / "plans_that_count" / "words.toml")
    Runs(store).propose(
        plan, SignedPlan.sign(plan, Ed25519PrivateKey.generate()), run="r", quorum=2
    )
    made = RunWriter(store, "r", on_event=lambda: None, on_checkpoint=lambda number: None)
    layout = statistics_layout(plan)
    sums = np.full(layout.size, 7.0, dtype=np.float32)
    made.save_adapter(1, layout.unpack(sums))
    made.save_checkpoint({"adapter": sums}, {"round": 1, "plan_sha256": plan.sha256})
    return made


def test_the_figures_are_offered_and_read_as_they_were_told(store, record, tmp_path):
    told = json.loads((GOLDEN / "statistics.json").read_text())
    record.append_event("statistics", found=told)
    source = StoredRuns(store)
    assert "statistics.json" in {offer.name for offer in source.files("r")}
    path = tmp_path / "statistics.json"
    path.write_bytes(source.read("r", "statistics.json"))
    assert read(path) == {**told, "run": told["run"]}


def test_the_bare_sums_are_neither_offered_nor_given(store, record):
    source = StoredRuns(store)
    assert "adapter.safetensors" not in {offer.name for offer in source.files("r")}
    for name in ("adapter.safetensors", "checkpoint.safetensors", "statistics.json"):
        with pytest.raises(FileNotOffered):
            source.read("r", name)
