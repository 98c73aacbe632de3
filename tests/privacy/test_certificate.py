"""Claims about certificates: they can be recomputed, and no figure in them can be changed."""

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dp_accounting import ComposedDpEvent
from dp_accounting.pld import PLDAccountant

from silotune.errors import CertificateInvalid
from silotune.plan.plan import Plan
from silotune.privacy.certificate import Bound, Measured, add_measured, issue, verify
from silotune.privacy.events import gaussian_event, step_event
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey
from silotune.privacy.tally import epsilon_of, total
from silotune.trust.identity import fingerprint

DELTA = 1e-5
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STEP = step_event(rate=0.05, sigma=1.0, steps=2)
METRICS = gaussian_event(10.0)
MODEL = "cd" * 32
WIDE = Budget(100.0, DELTA)
GOLDEN = Path(__file__).parents[1] / "golden"


def plan_with(**privacy):
    settings = {"mode": "record", "epsilon": 8.0, "delta": DELTA, "clip": 1.0, "batch": 10}
    return Plan.from_mapping(
        {
            "plan": {"name": "certified", "purpose": "test"},
            "model": {"base": "x", "task": "text_classification", "labels": ["a", "b"]},
            "data": {"dataset": "notes"},
            "rounds": {"number": 3},
            "privacy": settings | privacy,
        }
    )


PLAN = plan_with()


@pytest.fixture
def ledger(tmp_path):
    """Three rounds of updates, one with metrics; another run has spent as well."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for run, plan in (("run", PLAN.sha256), ("other", "ef" * 32)):
        ledger.reserve("notes", run, plan, ComposedDpEvent([STEP] * 3 + [METRICS]), budget=WIDE)
    for number in (1, 2):
        charge(ledger, number, STEP)
    charge(ledger, 3, ComposedDpEvent([METRICS, STEP]))
    key = ReleaseKey("other", 1, "update")
    ledger.charge("notes", key, "ef" * 32, STEP, "00" * 32)
    return ledger


def charge(ledger, number, event):
    key = ReleaseKey("run", number, "update")
    ledger.charge("notes", key, PLAN.sha256, event, "00" * 32)


def write(ledger, path, *, plan=PLAN, secure_noise=True, run="run"):
    return issue(
        path,
        ledger=ledger,
        dataset="notes",
        run=run,
        plan=plan,
        site="north",
        model_sha256=MODEL,
        secure_noise=secure_noise,
        key=KEY,
    )


@pytest.fixture
def certificate(ledger, tmp_path):
    path = tmp_path / "certificate.json"
    write(ledger, path)
    return path


def forge(path, change, *, key=None):
    """Change what a certificate says; sign again if a key is given."""
    document = json.loads(path.read_text())
    change(document["certificate"])
    if key is not None:
        text = json.dumps(document["certificate"], sort_keys=True, separators=(",", ":"))
        signature = key.sign(b"silotune certificate v2\0" + text.encode())
        document["signature"] = base64.b64encode(signature).decode()
        raw = key.public_key().public_bytes_raw()
        document["key"] = base64.b64encode(raw).decode()
    path.write_text(json.dumps(document))


def test_epsilon_is_that_of_one_composition_of_the_runs_own_events(certificate):
    verified = verify(certificate)
    once = PLDAccountant()
    once.compose(step_event(rate=0.05, sigma=1.0, steps=6)).compose(METRICS)
    assert verified.epsilon == pytest.approx(once.get_epsilon(DELTA), abs=1e-6)
    assert verified.body.epsilon == verified.epsilon


def test_a_certificate_says_what_was_done(certificate, ledger):
    body = verify(certificate).body
    assert (body.site, body.run, body.dataset, body.unit) == ("north", "run", "notes", "record")
    assert "add or remove one record" in body.adjacency_in_words
    assert {(m.rate, m.sigma, m.times) for m in body.mechanisms} == {(0.05, 1.0, 6), (1.0, 10.0, 1)}
    assert body.clips == {"all": 1.0}
    assert (body.plan_sha256, body.model_sha256) == (PLAN.sha256, MODEL)
    assert (body.ledger_seq, body.ledger_head) == (ledger.head.seq, ledger.head.hash)
    assert body.private
    assert body.statement.endswith("differential privacy for every record of this dataset")


def test_the_stated_epsilon_is_never_below_the_true_one(certificate):
    body = verify(certificate).body
    stated = float(body.statement[1:].split(",")[0])
    assert body.epsilon <= stated <= body.epsilon + 1e-4


def test_a_patient_level_run_says_so(tmp_path):
    plan = plan_with(unit="patient", max_records_per_unit=4)
    ledger = Ledger(tmp_path / "patients.sqlite")
    ledger.reserve("notes", "run", plan.sha256, STEP, budget=WIDE)
    ledger.charge("notes", ReleaseKey("run", 1, "update"), plan.sha256, STEP, "00" * 32)
    write(ledger, tmp_path / "certificate.json", plan=plan)
    body = verify(tmp_path / "certificate.json").body
    assert body.unit == "patient"
    assert "every patient" in body.statement
    assert "one patient, with all its records" in body.adjacency_in_words


def test_clip_groups_are_listed(tmp_path):
    plan = plan_with(clip={"head": 0.5, "adapter": 2.0})
    ledger = Ledger(tmp_path / "groups.sqlite")
    ledger.reserve("notes", "run", plan.sha256, STEP, budget=WIDE)
    ledger.charge("notes", ReleaseKey("run", 1, "update"), plan.sha256, STEP, "00" * 32)
    body = write(ledger, tmp_path / "certificate.json", plan=plan)
    assert body.clips == {"head": 0.5, "adapter": 2.0}


def test_a_seeded_run_is_certified_as_not_private(ledger, tmp_path):
    write(ledger, tmp_path / "seeded.json", secure_noise=False)
    body = verify(tmp_path / "seeded.json").body
    assert not body.private
    assert body.statement == "seeded: not private"
    assert body.noise == "seeded"


def test_a_run_that_charged_nothing_has_no_certificate(ledger, tmp_path):
    with pytest.raises(CertificateInvalid):
        write(ledger, tmp_path / "none.json", run="unknown")
    with pytest.raises(CertificateInvalid):
        write(ledger, tmp_path / "none.json", plan=plan_with(epsilon=9.0))
    public = plan_with(mode="none", epsilon=None, delta=None, clip=None)
    with pytest.raises(CertificateInvalid):
        write(ledger, tmp_path / "none.json", plan=public)
    assert not (tmp_path / "none.json").exists()


def change_every_field():
    """One small change for each thing a certificate says."""
    return {
        "format": "silotune certificate 3",
        "site": "south",
        "run": "ruin",
        "dataset": "letters",
        "unit": "patient",
        "adjacency": "replace_site",
        "epsilon": 0.5,
        "delta": 1e-9,
        "mechanisms": [],
        "aggregation": {"threshold": 3, "tolerated": 0, "shared_noise": False},
        "exposures": [],
        "clips": {},
        "noise": "seeded",
        "accountant": "mine",
        "accountant_version": "9",
        "code_version": "9",
        "plan_sha256": "00" * 32,
        "model_sha256": "00" * 32,
        "ledger_seq": 1,
        "ledger_head": "00" * 32,
        "measured": {"audit": None, "membership": None, "confidence": 0.95},
        "time": "yesterday",
    }


@pytest.mark.parametrize(("name", "value"), change_every_field().items())
def test_no_field_can_be_changed(certificate, name, value):
    forge(certificate, lambda body: body.update({name: value}))
    with pytest.raises(CertificateInvalid, match="signature"):
        verify(certificate)


def test_every_field_was_tried(certificate):
    assert set(change_every_field()) == set(json.loads(certificate.read_text())["certificate"])


def rate(body):
    next(m for m in body["mechanisms"] if m["rate"] == 0.05)["rate"] = 0.01


def fewer_times(body):
    next(m for m in body["mechanisms"] if m["times"] == 6)["times"] = 1


def a_lower_rate_before(body):
    body["earlier"] = [dict(body["mechanisms"][0], rate=0.01)]


def the_same_event_twice_before(body):
    """One of them is left out of what all runs together are said to cost."""
    part = body["mechanisms"][0]
    events = [{one["event"]: one["times"]} for one in (*body["mechanisms"], part)]
    body["earlier"] = [dict(part, times=1000), part]
    body["together"] = epsilon_of(total(events), delta=body["delta"])


SIGNED_LIES = {
    "a lower epsilon": (lambda body: body.update(epsilon=0.5), "epsilon = 0.5, its events give"),
    "a smaller delta": (lambda body: body.update(delta=1e-9), "its events give"),
    "a lower rate": (rate, "rate or sigma"),
    "fewer events": (fewer_times, "its events give"),
    "a lower rate of earlier runs": (a_lower_rate_before, "rate or sigma"),
    "fewer events of earlier runs": (the_same_event_twice_before, "with earlier runs"),
    "noise of another source": (lambda body: body.update(noise="plenty"), "noise"),
    "less exposure": (lambda body: body["exposures"][0].update(epsilon=0.1), "collusion"),
    "another adjacency": (lambda body: body.update(adjacency="replace_site"), "adjacency"),
    "a sentence": (lambda body: body.update(statement="perfectly private"), "statement"),
    "a field more": (lambda body: body.update(extra=1), "extra"),
    "an event of another kind": (
        lambda body: body["mechanisms"][0].update(event='{"kind":"laplace"}'),
        "can't be accounted for",
    ),
}


@pytest.mark.parametrize(("change", "said"), SIGNED_LIES.values(), ids=SIGNED_LIES)
def test_a_site_that_signs_what_its_events_contradict_is_caught(certificate, change, said):
    forge(certificate, change, key=KEY)
    with pytest.raises(CertificateInvalid, match=said):
        verify(certificate)


def test_the_signer_can_be_pinned(certificate):
    mine = fingerprint(KEY.public_key())
    assert verify(certificate, key_sha256=mine.upper()).key_sha256 == mine
    forge(certificate, lambda body: None, key=Ed25519PrivateKey.generate())
    verify(certificate)
    with pytest.raises(CertificateInvalid, match="another key"):
        verify(certificate, key_sha256=mine)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"certificate": {}, "key": "", "x": 1}'])
def test_what_is_not_a_certificate_is_refused(tmp_path, content):
    path = tmp_path / "certificate.json"
    path.write_text(content)
    with pytest.raises(CertificateInvalid):
        verify(path)
    with pytest.raises(CertificateInvalid):
        verify(tmp_path / "missing.json")


def test_no_sentence_is_signed(certificate):
    """A reworded release reads every certificate ever signed: words are made from terms."""
    body = json.loads(certificate.read_text())["certificate"]
    names = {"format", "site", "run", "dataset", "unit", "time"}
    texts = {key: value for key, value in body.items() if isinstance(value, str)}
    assert [key for key, value in texts.items() if " " in value and key not in names] == []
    assert all(set(row) == {"colluding", "epsilon"} for row in body["exposures"])


def test_a_certificate_made_long_ago_still_holds():
    """Golden: signed once by ``tests/golden/make_certificate.py``, never made again."""
    verified = verify(GOLDEN / "certificate.json", key_sha256=fingerprint(KEY.public_key()))
    assert verified.body.aggregation is not None
    assert verified.body.private


MEASURED = Measured(
    audit=Bound(claimed=3.0, lower_bound=1.5, canaries=1000), membership=None, confidence=0.95
)


def test_what_attacks_measured_is_signed_beside_what_is_claimed(certificate):
    before = verify(certificate).body
    add_measured(certificate, MEASURED, key=KEY)
    after = verify(certificate).body
    assert after.measured == MEASURED
    assert after.model_copy(update={"measured": None}) == before
    forge(certificate, lambda body: body["measured"]["audit"].update(lower_bound=0.0))
    with pytest.raises(CertificateInvalid, match="signature"):
        verify(certificate)


def test_only_the_site_adds_to_its_certificate(certificate):
    with pytest.raises(CertificateInvalid, match="another key"):
        add_measured(certificate, MEASURED, key=Ed25519PrivateKey.generate())
    assert verify(certificate).body.measured is None
