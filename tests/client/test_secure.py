"""The site's glue of secure aggregation: disk, gate, ledger, and its own bound on collusion."""

import numpy as np
import pytest
from flwr.app import RecordDict

from silotune.client.errors import RoundUnanswered
from silotune.client.model_cache import ModelCache
from silotune.client.site_run import SiteRun
from silotune.errors import BudgetExceeded
from silotune.models.layout import initial_adapter
from silotune.privacy.errors import CohortTooSmall, RoundUsed, TooFewSurvivors
from silotune.privacy.secagg.coordinator import CoordinatorRound
from silotune.privacy.secagg.messages import unpack_named
from silotune.trust.errors import SealBroken
from tests.federation import CHOICES, PRIVATE, SITES, write_federation, write_policy

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
        self.models = ModelCache(CHOICES)
        bare = federation.runs(self.plan, state=name)
        self.roster = {p.site.name: p._keys.signing.public_key().public_bytes_raw() for p in bare}
        self.parts = {name: self.started(name) for name in SITES}
        for part in self.parts.values():
            part.join()
        self.adapter = initial_adapter(part.training.trainable.model.layout, self.plan)
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
            models=self.models,
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


def test_processes_of_one_site_that_answer_in_turn_are_one_site(federation):
    """As Ray's actors do: one shares, another masks, the first opens, with what the other did."""
    played = Round(federation, "turns")
    first = dict(played.parts)
    for name in SITES:
        played.parts[name] = played.started(name)
        reply = played.masked(name)
        played.coordinator.add_masked(name, vector(reply), like=vector(reply))
        again = first[name].train_masked(
            played.adapter, 1, present=sorted(SITES), sealed=played.coordinator.sealed_for(name)
        )
        assert vector(again).tobytes() == vector(reply).tobytes()
    for name in SITES:
        opened = first[name].secure.opened(1, survivors=list(SITES), signatures={}, next_cohort=b"")
        played.coordinator.add_opening(name, unpack_named(released(opened, "opened")))
    total = played.coordinator.unmask()
    assert np.abs(total.view(np.int32)[:-1]).max() < 2**30


def test_the_charge_is_on_the_disk_before_the_masked_bytes_exist(federation, monkeypatch):
    played = Round(federation, "charge")
    part = played.parts["alpha"]

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(part.ledger, "charge", broken)
    with pytest.raises(RoundUnanswered):
        played.masked("alpha")
    again = played.started("alpha")
    assert again.ledger.events("notes") == []
    assert again.training.trainer.records_used == 0
    played.parts["alpha"] = again
    played.masked("alpha")  # nothing was masked, trained or charged: as if it had not been asked
    assert len(again.ledger.events("notes")) == 1


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


MANY = tuple(f"site-{i}" for i in range(7))
PROMISES = {
    "by the plan": {"min_sites": 7, "min_cohort": None},
    "by the site's policy": {"min_sites": 3, "min_cohort": 7},
}


class SevenSites:
    """Seven enrolled sites, and a coordinator that shows a site as many of them as it likes."""

    def __init__(self, folder, base, *, min_sites, min_cohort):
        self.federation = write_federation(folder, base, names=MANY)
        if min_cohort:
            for name in MANY:
                write_policy(folder / name / "site.toml", base, min_cohort=min_cohort)
        # No threshold: then only the size of the cohort says how many sites a sum is over.
        self.plan = self.federation.plan.override(
            {
                **PRIVATE,
                "aggregation.secure": True,
                "aggregation.cohort": 7,
                "rounds.min_sites": min_sites,
                "rounds.evaluate_every": 0,
            }
        )
        self.parts = {part.site.name: part for part in self.federation.runs(self.plan)}
        roster = {
            name: part._keys.signing.public_key().public_bytes_raw()
            for name, part in self.parts.items()
        }
        for part in self.parts.values():
            part._roster = roster
        self.coordinator = CoordinatorRound(threshold=None, largest_cohort=7)

    def cohort_of(self, names):
        for name in names:
            keys = released(self.parts[name].in_secure(1).keys(1), "keys")
            self.coordinator.advertise(name, keys)
        return self.coordinator.cohort.to_bytes()


@pytest.mark.parametrize("stated", PROMISES.values(), ids=PROMISES)
def test_a_site_that_was_promised_seven_shares_nothing_with_a_cohort_of_three(
    stated, tmp_path, bert_folder
):
    played = SevenSites(tmp_path, bert_folder, **stated)
    shown = played.cohort_of(MANY[:3])
    part = played.parts[MANY[0]]
    with pytest.raises(CohortTooSmall, match="3 members; this site's minimum is 7"):
        part.in_secure(1).share(1, shown)
    # Nor can it be brought to mask: it has shared its secrets with nobody.
    adapter = np.zeros(part.training.trainable.model.layout.size, np.float32)
    with pytest.raises(RoundUsed):
        part.train_masked(adapter, 1, present=MANY[:3], sealed={})
    assert part.ledger.events("notes") == []


def test_a_site_that_was_promised_seven_opens_no_sum_of_fewer(tmp_path, bert_folder):
    played = SevenSites(tmp_path, bert_folder, min_sites=7, min_cohort=None)
    shown = played.cohort_of(MANY)
    for name in MANY:
        sealed = released(played.parts[name].in_secure(1).share(1, shown), "shares")
        played.coordinator.add_shares(name, unpack_named(sealed))
    part = played.parts[MANY[0]]
    part.join()
    adapter = initial_adapter(part.training.trainable.model.layout, played.plan)
    sealed = played.coordinator.sealed_for(MANY[0])
    with pytest.raises(CohortTooSmall):  # the masks of those that are left out would not go on
        few = {name: blob for name, blob in sealed.items() if name in MANY[:6]}
        part.train_masked(adapter, 1, present=list(MANY[:6]), sealed=few)
    part.train_masked(adapter, 1, present=list(MANY), sealed=sealed)
    for ask in (
        lambda names: part.secure.check(1, names),
        lambda names: part.secure.opened(1, survivors=names, signatures={}, next_cohort=b""),
    ):
        with pytest.raises(TooFewSurvivors, match="5 survivors; the threshold here is 7"):
            ask(MANY[:5])  # five are a quorum of seven
    part.secure.check(1, list(MANY))
