"""Claims about the only door out of a site."""

import hashlib
import logging
import stat

import numpy as np
import pytest
from dp_accounting import ComposedDpEvent
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from silotune.client import gate as gate_module
from silotune.client.gate import DpRelease, Gate, Public, Reply, Unprotected, refusal
from silotune.client.run_files import OUTBOX, RunFiles
from silotune.errors import (
    BudgetExceeded,
    LedgerDamaged,
    PrivacyError,
    ReleaseConflict,
    SelfCheckFailed,
    ValueUnaccounted,
    catalogue,
)
from silotune.plan.plan import Plan
from silotune.privacy import accounting
from silotune.privacy.events import gaussian_event, step_event
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey
from silotune.privacy.tally import tally_of

DELTA = 1e-5
STEP = step_event(rate=0.1, sigma=1.0, steps=1)
METRICS = gaussian_event(20.0)
FLAT = np.arange(6, dtype=np.float32)


def make_plan(mode="record"):
    privacy = {"mode": mode, "batch": 10}
    if mode != "none":
        privacy |= {"epsilon": 8.0, "delta": DELTA, "clip": 1.0}
    return Plan.from_mapping(
        {
            "plan": {"name": "gate", "purpose": "test"},
            "model": {"base": "nowhere", "task": "causal_lm"},
            "data": {"dataset": "notes"},
            "rounds": {"number": 20},
            "privacy": privacy,
        }
    )


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A private site with a ledger whose budget has room for 30 mechanisms."""
    monkeypatch.setattr(
        accounting,
        "epsilon",
        lambda events, **terms: float(sum(sum(tally_of(e).values()) for e in events)),
    )
    return Site(tmp_path)


class Site:
    def __init__(self, folder, run="run"):
        self.folder, self.plan, self.run = folder, make_plan(), run
        self.ledger = Ledger(folder / "ledger.sqlite")
        whole = ComposedDpEvent([STEP] * 10 + [METRICS] * 10)
        self.ledger.reserve("notes", run, self.plan.sha256, whole, budget=Budget(30.0, DELTA))
        self.gate = self.new_gate()

    def new_gate(self):
        return Gate(
            ledger=self.ledger,
            dataset="notes",
            plan=self.plan,
            outbox=RunFiles(self.folder, OUTBOX, run=self.run),
        )

    def key(self, number=1, release="update"):
        return ReleaseKey(self.run, number, release)

    def update(self, number=1, value=FLAT):
        return self.gate.release(
            self.key(number),
            fields={"update": DpRelease(value, mechanism="step")},
            mechanisms={"step": STEP},
        )

    def stored(self):
        return sorted(p.name for p in (self.folder / "outbox").iterdir())

    def untouched(self):
        return not self.stored() and not self.ledger.events("notes")


# --- what leaves --------------------------------------------------------------------------------


def test_a_reply_holds_exactly_its_fields(site):
    reply = site.gate.release(
        site.key(),
        fields={
            "update": DpRelease(FLAT, mechanism="step"),
            "loss": DpRelease(np.float32(0.5), mechanism="metrics"),
            "declared_units": Public(200, source="site.toml: declared_units"),
        },
        mechanisms={"step": STEP, "metrics": METRICS},
    )
    assert set(reply) == {"update", "released"}
    assert isinstance(reply["update"], ArrayRecord)
    assert list(reply["update"]) == ["flat"]
    np.testing.assert_array_equal(reply["update"]["flat"].numpy(), FLAT)
    assert isinstance(reply["released"], MetricRecord)
    assert dict(reply["released"]) == {"loss": 0.5, "declared_units": 200}


def test_texts_among_the_scalars_make_a_config_record(site):
    source = "site.toml: name"
    fields = {"site": Public("north", source), "declared_units": Public(200, source)}
    reply = site.gate.release(site.key(0, "join"), fields=fields)
    assert isinstance(reply["released"], ConfigRecord)
    assert dict(reply["released"]) == {"site": "north", "declared_units": 200}


def test_public_values_alone_are_neither_charged_nor_stored(site):
    site.gate.release(site.key(), fields={"round": Public(1, "protocol: round")})
    assert site.untouched()
    assert site.gate.recall(site.key()) is None


def test_one_mechanism_behind_several_fields_is_charged_once(site):
    site.gate.release(
        site.key(),
        fields={
            "update": DpRelease(FLAT, mechanism="step"),
            "norm": DpRelease(1.5, mechanism="step"),
        },
        mechanisms={"step": STEP},
    )
    assert [tally_of(e) for e in site.ledger.events("notes")] == [tally_of(STEP)]


def test_two_equal_mechanisms_of_one_reply_are_both_charged(site):
    site.gate.release(
        site.key(),
        fields={
            "first": DpRelease(1.0, mechanism="first"),
            "second": DpRelease(2.0, mechanism="second"),
        },
        mechanisms={"first": METRICS, "second": METRICS},
    )
    (event,) = site.ledger.events("notes")
    assert tally_of(event) == tally_of(ComposedDpEvent([METRICS, METRICS]))


# --- what does not ------------------------------------------------------------------------------


UNACCOUNTED = {
    "bare array": FLAT,
    "bare number": 0.25,
    "unprotected": Unprotected(FLAT),
    "unprotected number": Unprotected(3),
    "public without source": Public(3, source=""),
    "public with a vague source": Public(3, source="I say so"),
    "public array": Public(FLAT, source="plan: rounds"),
    "public list": Public([1, 2], source="plan: rounds"),
    "release without an event": DpRelease(FLAT, mechanism="metrics"),
    "release of an object": DpRelease(object(), mechanism="step"),
    "release of texts": DpRelease(np.array(["a"]), mechanism="step"),
    "release of objects": DpRelease(np.array([None]), mechanism="step"),
    "release of complex numbers": DpRelease(np.array([1j]), mechanism="step"),
    "huge integer": DpRelease(2**63, mechanism="step"),
}


@pytest.mark.parametrize("field", UNACCOUNTED.values(), ids=UNACCOUNTED)
def test_a_value_without_an_account_stops_the_whole_reply(site, field):
    with pytest.raises(ValueUnaccounted):
        site.gate.release(
            site.key(),
            fields={"update": DpRelease(FLAT, mechanism="step"), "other": field},
            mechanisms={"step": STEP},
        )
    assert site.untouched()


@pytest.mark.parametrize("name", ["", "Update", "a b", "1st", "x" * 65, "ünit"])
def test_odd_field_names_are_refused(site, name):
    with pytest.raises(ValueUnaccounted):
        site.gate.release(site.key(), fields={name: Public(1, "plan: seed")})


def test_an_array_may_not_take_the_place_of_the_scalars(site):
    with pytest.raises(ValueUnaccounted):
        site.gate.release(
            site.key(),
            fields={"released": DpRelease(FLAT, mechanism="step")},
            mechanisms={"step": STEP},
        )


def test_a_mechanism_without_an_output_is_refused(site):
    with pytest.raises(ValueUnaccounted, match="no output"):
        site.gate.release(
            site.key(),
            fields={"update": DpRelease(FLAT, mechanism="step")},
            mechanisms={"step": STEP, "forgotten": METRICS},
        )
    assert site.untouched()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(site, bad):
    spoiled = FLAT.copy()
    spoiled[3] = bad
    for value in (spoiled, bad, np.float32(bad)):
        with pytest.raises(SelfCheckFailed):
            site.update(value=value)
    with pytest.raises(SelfCheckFailed):
        site.gate.release(site.key(), fields={"x": Public(float(bad), "plan: x")})
    assert site.untouched()


def test_a_release_of_another_run_is_refused(site):
    for call in (site.gate.recall, lambda key: site.gate.release(key, fields={})):
        with pytest.raises(ValueUnaccounted):
            call(ReleaseKey("other", 1, "update"))


@pytest.mark.parametrize("mode", ["record", "none"])
def test_a_gate_needs_a_ledger_exactly_if_the_plan_is_private(tmp_path, mode):
    ledger = Ledger(tmp_path / "ledger.sqlite") if mode == "none" else None
    with pytest.raises(PrivacyError):
        Gate(
            ledger=ledger,
            dataset="notes",
            plan=make_plan(mode),
            outbox=RunFiles(tmp_path, OUTBOX, run="r"),
        )


# --- charged before it leaves -------------------------------------------------------------------


def test_a_charge_comes_before_the_reply_and_the_reply_is_on_the_disk_when_it_is_named(
    site, monkeypatch
):
    assert site.gate.charge(site.key(), {"step": STEP})
    assert not site.gate.charge(site.key(), {"step": STEP})  # once
    assert len(site.ledger.events("notes")) == 1 and site.gate.recall(site.key()) is None
    with pytest.raises(ReleaseConflict):
        site.gate.charge(site.key(), {"metrics": METRICS})
    real, seen = Ledger.bind, []

    def watched(self, dataset, key, payload_sha256):
        assert self.payload_of(key) is None
        name = f"{key.release}-{payload_sha256}"
        seen.append(RunFiles(site.folder, OUTBOX, run="run").read(key.round, name=name))
        real(self, dataset, key, payload_sha256)

    monkeypatch.setattr(Ledger, "bind", watched)
    reply = site.update()
    assert len(site.ledger.events("notes")) == 1
    assert Reply.from_bytes(seen[0]).records().object_id == reply.object_id
    assert Ledger(site.ledger.path).payload_of(site.key()) is not None


@pytest.mark.parametrize("error", [BudgetExceeded(), LedgerDamaged(), OSError("disk gone")])
def test_what_can_not_be_charged_does_not_leave(site, monkeypatch, error):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(Ledger, "charge", failing)
    with pytest.raises(type(error)):
        site.update()
    assert site.untouched()
    assert site.gate.recall(site.key()) is None


def test_the_budget_holds_at_the_gate(site):
    for number in range(1, 21):  # ten of them reserved, ten from what the budget has left
        site.update(number)
    with pytest.raises(BudgetExceeded):
        site.update(21)
    assert len(site.ledger.events("notes")) == 20
    assert not any("00000021" in name for name in site.stored())


# --- asked again --------------------------------------------------------------------------------


def test_a_repeated_request_gets_the_same_bytes_free_of_charge(site):
    first = site.update()
    for gate in (site.gate, site.new_gate()):
        again = gate.recall(site.key())
        assert again.object_id == first.object_id
    assert len(site.ledger.events("notes")) == 1


def test_the_same_release_twice_is_charged_once(site):
    assert site.update().object_id == site.update().object_id
    assert len(site.ledger.events("notes")) == 1


def test_another_reply_under_a_used_key_is_refused_and_the_first_is_kept(site):
    first = site.update()
    with pytest.raises(ReleaseConflict):
        site.update(value=FLAT + 1)
    assert len(site.stored()) == 1
    assert site.gate.recall(site.key()).object_id == first.object_id


def test_nothing_is_recalled_that_was_not_released(site):
    assert site.gate.recall(site.key()) is None
    payload = Reply(arrays={"update": FLAT}, scalars={}).to_bytes()
    name = f"update-{hashlib.sha256(payload).hexdigest()}"
    RunFiles(site.folder, OUTBOX, run="run").write(1, payload, name=name)
    assert site.gate.recall(site.key()) is None


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"x")])
def test_a_charged_reply_that_is_gone_is_refused_not_made_again(site, damage):
    site.update()
    damage(next((site.folder / "outbox").iterdir()))
    with pytest.raises(ReleaseConflict):
        site.gate.recall(site.key())


def test_releases_of_one_round_are_kept_apart(site):
    update = site.update()
    metrics = site.gate.release(
        site.key(1, "metrics"),
        fields={"loss": DpRelease(0.5, mechanism="metrics")},
        mechanisms={"metrics": METRICS},
    )
    assert site.gate.recall(site.key(1, "update")).object_id == update.object_id
    assert site.gate.recall(site.key(1, "metrics")).object_id == metrics.object_id


values = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    st.text(),
    st.binary(),
)
names = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True).filter(lambda n: n != "released")
arrays = hnp.arrays(
    dtype=st.sampled_from(["<f4", "<f8", "<f2", "<i8", "<u4", "|u1"]),
    shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4),
)


@given(st.dictionaries(names, arrays, max_size=3), st.dictionaries(names, values, max_size=4))
def test_a_stored_reply_is_the_same_to_the_last_bit(some_arrays, some_scalars):
    reply = Reply(arrays=some_arrays, scalars=some_scalars)
    again = Reply.from_bytes(reply.to_bytes())
    assert again.to_bytes() == reply.to_bytes()
    assert again.records().object_id == reply.records().object_id
    for name, array in some_arrays.items():
        assert again.arrays[name].tobytes() == array.tobytes()


# --- the outbox's files -------------------------------------------------------------------------


def test_stored_replies_are_private_and_stay_in_their_folder(tmp_path, site):
    nasty = Site(tmp_path / "nasty", run="../../../etc/passwd\\..%00 x")
    nasty.update()
    files = [p for p in (tmp_path / "nasty").rglob("*") if p.is_file()]
    (stored,) = [p for p in files if p.parent.name == "outbox"]
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert not list(tmp_path.glob("etc*"))


def test_a_reply_open_to_other_accounts_is_not_sent_again(site):
    site.update()
    next((site.folder / "outbox").iterdir()).chmod(0o644)
    with pytest.raises(PrivacyError):
        site.gate.recall(site.key())


def test_only_the_last_few_rounds_are_kept(site):
    for number in range(1, 11):
        site.update(number)
    assert len(site.stored()) == 4
    assert site.gate.recall(site.key(7)) is not None
    with pytest.raises(ReleaseConflict):
        site.gate.recall(site.key(6))


# --- without privacy ----------------------------------------------------------------------------


@pytest.fixture
def open_gate(tmp_path):
    return Gate(
        ledger=None,
        dataset="notes",
        plan=make_plan("none"),
        outbox=RunFiles(tmp_path, OUTBOX, run="run"),
    )


def test_without_privacy_replies_are_recalled_all_the_same(open_gate):
    key = ReleaseKey("run", 1, "update")
    assert open_gate.recall(key) is None
    fields = {"update": Unprotected(FLAT), "loss": Unprotected(0.5), "note": Unprotected("x")}
    first = open_gate.release(key, fields=fields)
    assert open_gate.recall(key).object_id == first.object_id
    assert open_gate.release(key, fields=fields).object_id == first.object_id
    with pytest.raises(ReleaseConflict):
        open_gate.release(key, fields={"update": Unprotected(FLAT + 1)})


def test_without_a_ledger_nothing_can_pass_as_private(open_gate):
    with pytest.raises(ValueUnaccounted):
        open_gate.release(
            ReleaseKey("run", 1, "update"),
            fields={"update": DpRelease(FLAT, mechanism="step")},
            mechanisms={"step": STEP},
        )


def test_without_privacy_values_must_still_be_finite(open_gate):
    with pytest.raises(SelfCheckFailed):
        open_gate.release(
            ReleaseKey("run", 1, "update"), fields={"update": Unprotected(FLAT * np.nan)}
        )


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", catalogue(), ids=lambda kind: kind.code)
def test_a_refusal_is_the_code_and_nothing_else(kind):
    assert refusal(kind("patient 4711 has no label")) == kind.code


def test_an_unknown_error_has_no_code_of_its_own_and_stays_in_the_local_log(caplog):
    with caplog.at_level(logging.ERROR, logger=gate_module.__name__):
        assert refusal(KeyError("patient 4711")) == "ST-000"
    assert "4711" in caplog.text


def test_a_made_up_code_does_not_leave():
    class Odd(PrivacyError):
        code = "patient 4711"

    assert refusal(Odd()) == "ST-000"
