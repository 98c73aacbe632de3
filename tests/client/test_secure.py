"""The site's glue of secure aggregation: disk, gate, ledger, and its own bound on collusion."""

import numpy as np
import pytest
from flwr.app import RecordDict

from silotune.client.runtime import SiteRun
from silotune.client.warm import WarmModel
from silotune.errors import BudgetExceeded
from silotune.federation.errors import SealBroken
from silotune.models.layout import initial_adapter
from silotune.privacy.errors import RoundUsed
from silotune.privacy.secagg.coordinator import CoordinatorRound
from silotune.privacy.secagg.messages import unpack_named
from tests.federation import CHOICES, PRIVATE, SITES, write_federation

SECURE = {
    **PRIVATE,
    "aggregation.secure": True,
    "aggregation.cohort": 3,
    "aggregation.threshold": 2,
    "privacy.noise": "shared",
    "rounds.evaluate_every": 0,
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory, bert_folder):
    return write_federation(tmp_path_factory.mktemp("glue"), bert_folder)


class Round:
    """Three sites with disks, up to the masked updates of round 1."""

    def __init__(self, federation, name):
        self.federation, self.folder = federation, federation.folder / name
        self.plan = federation.plan.override(SECURE)
        self.warm = WarmModel(CHOICES)
        bare = federation.runs(self.plan, state=name)
        self.roster = {p.site.name: p._keys.signing.public_key().public_bytes_raw() for p in bare}
        self.parts = {name: self.started(name) for name in SITES}
        for part in self.parts.values():
            part.join()
        self.adapter = initial_adapter(part.trainable.model.layout, self.plan)
        self.coordinator = CoordinatorRound(threshold=2, largest_cohort=3)
        for name, part in self.parts.items():
            self.coordinator.advertise(name, released(part.secure.keys(1), "keys"))
        blob = self.coordinator.cohort.to_bytes()
        for name, part in self.parts.items():
            sealed = released(part.secure.share(1, blob), "shares")
            self.coordinator.add_shares(name, unpack_named(sealed))

    def started(self, name):
        """A fresh process of a site, on the disk of the last one."""
        (site,) = [s for s in self.federation.sites if s.name == name]
        return SiteRun(
            site,
            state=self.folder / name,
            plan=self.plan,
            run="r",
            warm=self.warm,
            roster=self.roster,
        )

    def masked(self, name, **changes):
        asked = {"present": sorted(SITES), "sealed": self.coordinator.sealed_for(name), **changes}
        return self.parts[name].train_masked(self.adapter, 1, **asked)


def released(reply: RecordDict, key):
    return reply.config_records["released"][key]


def vector(reply):
    return reply.array_records["update"]["flat"].numpy()


def test_a_resent_request_gets_the_same_masked_bytes_and_costs_nothing(federation):
    played = Round(federation, "resend")
    first = played.masked("alpha")
    played.parts["alpha"] = played.started("alpha")  # also after a restart
    again = played.masked("alpha")
    assert vector(again).tobytes() == vector(first).tobytes()
    assert released(again, "keys") == released(first, "keys")
    assert len(played.parts["alpha"].ledger.events("notes")) == 1


def test_the_same_round_for_another_cohort_is_refused_and_not_charged(federation):
    played = Round(federation, "other")
    played.masked("alpha")
    sealed = played.coordinator.sealed_for("alpha")
    with pytest.raises(RoundUsed):
        played.masked("alpha", present=["alpha", "beta"], sealed={"beta": sealed["beta"]})
    with pytest.raises(RoundUsed):
        played.parts["alpha"].secure.keys(1)
    assert len(played.parts["alpha"].ledger.events("notes")) == 1


def test_a_site_restarted_between_sharing_and_masking_goes_on(federation):
    played = Round(federation, "restart")
    for name in SITES:
        played.parts[name] = played.started(name)
        reply = played.masked(name)
        played.coordinator.add_masked(name, vector(reply), like=vector(reply))
    for name in SITES:
        played.parts[name] = played.started(name)
        opened = played.parts[name].secure.opened(
            1, survivors=list(SITES), signatures={}, next_cohort=b""
        )
        played.coordinator.add_opening(name, unpack_named(released(opened, "opened")))
    total = played.coordinator.unmask()
    assert np.abs(total.view(np.int32)[:-1]).max() < 2**30


def test_the_charge_is_on_the_disk_before_the_masked_bytes_exist(federation, monkeypatch):
    played = Round(federation, "charge")
    part = played.parts["alpha"]

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(part.ledger, "charge", broken)
    with pytest.raises(OSError, match="disk full"):
        played.masked("alpha")
    again = played.started("alpha")
    assert again.ledger.events("notes") == []
    played.parts["alpha"] = again
    # Masked on the disk, never charged: the site sits this round out.
    with pytest.raises(RoundUsed):
        played.masked("alpha")


def test_an_edited_state_is_refused(federation):
    played = Round(federation, "edited")
    (file,) = (played.folder / "alpha" / "rounds").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    played.parts["alpha"] = played.started("alpha")
    with pytest.raises(SealBroken):
        played.masked("alpha")


def test_a_run_that_collusion_would_make_too_weak_is_refused_before_anything_is_reserved(
    federation,
):
    played = Round(federation, "bound")
    part = played.started("alpha")
    part.run = "another"
    budget = part.dataset.budget.model_copy(update={"colluding_epsilon": 8.5, "epsilon": 90.0})
    part.dataset = part.dataset.model_copy(update={"budget": budget})
    rows = len(part.ledger.rows())
    with pytest.raises(BudgetExceeded, match="collude"):
        part._reserve()
    assert len(part.ledger.rows()) == rows
    local = replace_noise(part)
    local._reserve()  # all of the noise its own: nothing to fear


def replace_noise(part):
    part.plan = part.plan.override({"privacy.noise": "local", "privacy.epsilon": 0.1})
    del part.__dict__["sigma"]
    budget = part.dataset.budget.model_copy(update={"colluding_epsilon": 90.0})
    part.dataset = part.dataset.model_copy(update={"budget": budget})
    return part
