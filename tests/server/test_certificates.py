"""Claims about privacy certificates at the coordinator: a site's own, whole, for the right run."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.errors import CertificateInvalid
from silotune.privacy.certificate import issue
from silotune.privacy.events import gaussian_event
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey
from silotune.protocol import http
from silotune.server.books import Certificates
from silotune.server.errors import NotPossibleNow
from silotune.trust.signed import SignedPlan
from tests.server.coordinator_material import town
from tests.server.monitored import plan_of

__all__ = ["town"]

PLAN = plan_of()


def certificate(folder, *, site="north", run="demo-1", key, plan=PLAN):
    """As a site writes it when a run is over."""
    folder.mkdir()
    ledger = Ledger(folder / "ledger.sqlite")
    event = gaussian_event(4.0)
    ledger.reserve("d", run, plan.sha256, event, budget=Budget(8.0, 1e-5))
    ledger.charge("d", ReleaseKey(run, 1, "update"), plan.sha256, event, "00" * 32)
    named = {"dataset": "d", "run": run, "plan": plan, "site": site}
    sealed = {"model_sha256": "ab" * 32, "secure_noise": True, "key": key}
    issue(folder / "c.json", ledger=ledger, **named, **sealed)
    ledger.close()
    return (folder / "c.json").read_text()


@pytest.fixture
def scene(town):
    """A run, a member called north, and what takes certificates."""
    north = town.enrolled("north")
    coordinator = town.coordinator
    for run in ("demo-1", "demo-2"):
        signed = SignedPlan.sign(PLAN, coordinator.keys.signing)
        coordinator.run_control.runs.propose(PLAN, signed, run=run, quorum=2)
    return north, Certificates(coordinator.store, coordinator.registrar, coordinator.audit)


def handed(text, run="demo-1"):
    return http.HandedIn(run=run, certificate=text)


def offered(town, run="demo-1"):
    return [o.name for o in town.coordinator.operations.source.files(run)]


def test_a_certificate_is_handed_in_over_the_wire_and_offered_byte_for_byte(town, scene, tmp_path):
    north, _ = scene
    text = certificate(tmp_path / "c", key=north.signing)
    assert "certificate-north.json" not in offered(town)
    with north.http() as client:
        answer = client.post(http.CERTIFICATE, content=handed(text).model_dump_json())
    assert answer.status_code == 200
    source = town.coordinator.operations.source
    assert source.read("demo-1", "certificate-north.json") == text.encode()
    assert "certificate-north.json" not in offered(town, "demo-2")
    assert town.audit("certificate_taken")[-1]["site"] == "north"


@pytest.mark.parametrize("wrong", ["key", "site", "run", "plan", "changed", "nonsense"])
def test_a_certificate_that_is_not_the_sites_own_for_this_run_is_refused(
    wrong, town, scene, tmp_path
):
    north, certificates = scene
    changes = {
        "key": {"key": Ed25519PrivateKey.generate()},
        "site": {"site": "south"},
        "run": {"run": "demo-2"},
        "plan": {"plan": plan_of(rounds=9)},
    }.get(wrong, {})
    text = certificate(tmp_path / "c", **{"key": north.signing, **changes})
    if wrong == "changed":
        document = json.loads(text)
        document["certificate"]["epsilon"] = 0.0
        text = json.dumps(document)
    if wrong == "nonsense":
        text = "<script>alert(1)</script>"
    with pytest.raises(CertificateInvalid):
        certificates.take("north", handed(text))
    assert "certificate-north.json" not in offered(town)


def test_a_run_that_is_not_there_takes_none(scene, tmp_path):
    north, certificates = scene
    text = certificate(tmp_path / "c", run="nothing", key=north.signing)
    with pytest.raises(NotPossibleNow):
        certificates.take("north", handed(text, run="nothing"))


def test_a_later_certificate_replaces_the_first(town, scene, tmp_path):
    north, certificates = scene
    first, second = (certificate(tmp_path / n, key=north.signing) for n in ("one", "two"))
    for text in (first, second):
        certificates.take("north", handed(text))
    assert offered(town).count("certificate-north.json") == 1
    source = town.coordinator.operations.source
    assert source.read("demo-1", "certificate-north.json") == second.encode()
