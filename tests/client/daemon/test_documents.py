"""The paper work: rosters, decisions, certificates, counter-signed heads, closed books."""

import base64
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.client.approvals import Approvals, difference
from silotune.client.daemon import documents
from silotune.client.daemon.api import closing_api
from silotune.client.daemon.books import verify_books
from silotune.client.daemon.daemon import CERTIFICATES
from silotune.client.daemon.documents import DocumentExchange
from silotune.client.errors import CohortBelowPolicy
from silotune.client.run_files import KEPT_DAYS, KINDS, MEMORY, ROUNDS, RunFiles
from silotune.errors import LedgerDamaged, PlanSignatureInvalid
from silotune.privacy import certificate
from silotune.trust.audit import AuditHead
from silotune.trust.errors import AuditLogDamaged, RosterInvalid
from silotune.trust.identity import fingerprint
from tests.client.coordinator_double import CoordinatorDouble
from tests.client.site_rig import Rig

ROOT = Path(__file__).parents[3]
DAY = 24 * 3600.0


@pytest.fixture
def rig(tmp_path, bert_folder):
    double = CoordinatorDouble(tmp_path / "coordinator")
    with double, Rig(tmp_path / "sites", bert_folder, double) as rig:
        yield rig


@pytest.fixture
def api(rig):
    with closing_api(rig.enrolment.facts.url, rig.enrolment.tls()) as api:
        yield api


def kinds(rig):
    return [line.kind for line in rig.audit.lines()]


def member(rig, name):
    return rig.double.member.model_copy(update={"name": name})


def test_the_roster_is_followed_and_written_down(rig, api):
    rig.double.change_roster([rig.double.member, member(rig, "beta")])
    rig.documents.take_rosters(api)
    assert set(rig.enrolment.roster.active) == {"alpha", "beta"}
    last = rig.audit.lines()[-1]
    assert (last.kind, last.fields["changed"]) == ("roster", ["beta"])
    rig.documents.take_rosters(api)
    assert rig.audit.lines()[-1] == last


@pytest.mark.parametrize("how", ["unsigned", "skipped", "rewritten", "rolled back"])
def test_a_roster_that_is_not_the_next_one_is_refused(rig, api, how):
    double = rig.double
    before = rig.enrolment.roster
    if how == "unsigned":
        double.change_roster([double.member], key=Ed25519PrivateKey.generate())
    elif how == "skipped":
        for name in ("beta", "gamma"):
            double.change_roster([double.member, member(rig, name)])
        del double.signed_rosters[-2]
    else:
        history = list(double.signed_rosters)
        double.roster = history[0].verify(double.key.public_key())
        double.signed_rosters = history[:1]
        double.change_roster([double.member, member(rig, "beta")])
        if how == "rolled back":
            double.change_roster([double.member])
        # The site asks for what is behind its version, and is told another history.
        api.rosters = lambda *, after: tuple(double.signed_rosters[1:])
    with pytest.raises(RosterInvalid):
        rig.documents.take_rosters(api)
    assert rig.enrolment.roster == before


def test_proposals_wait_for_a_person_and_decisions_are_signed(rig, api):
    rig.double.propose("r1", rig.plan)
    rig.documents.take_plans(api)
    assert [entry.state for entry in rig.approvals.entries()] == ["proposed"]
    assert rig.double.decisions == []
    rig.documents.decide("r1", "approved", reason="", by="uid 0")
    rig.documents.take_plans(api)
    decision = rig.double.decisions[0]
    assert decision.verified(rig.enrolment.keys.signing.public_key())
    assert (decision.run, decision.plan_sha256) == ("r1", rig.plan.sha256)
    assert "approved" in kinds(rig)


def test_a_plan_that_the_federation_did_not_sign_is_not_even_kept(rig, api):
    rig.double.propose("forged", rig.plan, key=Ed25519PrivateKey.generate())
    honest = rig.double.proposals["forged"].model_copy(update={"run": "hash"})
    rig.double.propose("good", rig.plan)
    rig.double.proposals["hash"] = rig.double.proposals["good"].model_copy(
        update={"run": "hash", "plan_sha256": "ab" * 32}
    )
    assert honest.run == "hash"
    rig.documents.take_plans(api)
    assert [entry.run for entry in rig.approvals.entries()] == ["good"]
    refused = [line.fields for line in rig.audit.lines() if line.kind == "proposal_refused"]
    assert {(f["run"], f["code"]) for f in refused} == {("forged", "ST-103"), ("hash", "ST-103")}
    with pytest.raises(PlanSignatureInvalid):
        rig.approvals.take(rig.double.proposals["hash"], rig.enrolment.federation_key)


def test_automatic_approval_is_the_policys_word(rig, api):
    def judge(entry):
        if entry.run == "bad":
            raise CohortBelowPolicy("too few")

    exchange = DocumentExchange(
        enrolment=rig.enrolment, approvals=rig.approvals, audit=rig.audit, books=rig.books, judge=judge,
        settle=lambda entry: None,
    )  # fmt: skip
    for run in ("good", "bad"):
        rig.double.propose(run, rig.plan)
    exchange.take_plans(api)
    assert {(d.run, d.verdict, d.reason) for d in rig.double.decisions} == {
        ("good", "approved", ""),
        ("bad", "rejected", "ST-508"),
    }


def test_a_run_that_is_over_is_settled_and_certified_once(rig, api):
    rig.approve("r1")
    rig.ask("query.join")
    rig.ask("train", 1)
    rig.double.propose("r1", rig.plan, state="finished")
    rig.documents.take_plans(api)
    rig.documents.take_plans(api)
    assert kinds(rig).count("run_settled") == 1
    held = certificate.verify(rig.state / "certificate.json")
    assert held.key_sha256 == fingerprint(rig.enrolment.keys.signing.public_key())
    assert 0 < held.epsilon < 4.0  # one of five rounds
    assert [row.entry.kind for row in rig.ledger_rows()] == [
        "reserve",
        "charge",
        "release",
        "settle",
    ]


def test_a_failed_run_that_was_resumed_is_settled_again_at_its_end(rig, api):
    rig.approve("r1")
    rig.ask("query.join")
    for state, settled in (("failed", 1), ("running", 1), ("finished", 2), ("finished", 2)):
        rig.double.propose("r1", rig.plan, state=state)
        rig.documents.take_plans(api)
        assert kinds(rig).count("run_settled") == settled
        assert rig.approvals.find("r1").settled == (state != "running")


def stored(rig, run):
    stem = hashlib.sha256(run.encode()).hexdigest()[:16]
    return {
        path.parent.name for kind in KINDS for path in (rig.state / kind.folder).glob(f"*{stem}*")
    }


def test_files_of_a_run_go_thirty_days_after_its_end_and_not_before(rig, api, monkeypatch):
    for run in ("over", "open"):
        rig.approve(run)
        rig.ask("query.join", run=run)
        rig.ask("train", 1, run=run)
        for kind in (ROUNDS, MEMORY):  # which this plan has nothing for
            RunFiles(rig.state, kind, run=run, vault=rig.vault).write(1, b"of the run")
    everything = {kind.folder for kind in KINDS}
    rig.double.propose("over", rig.plan, state="finished")
    rig.documents.take_plans(api)
    end = rig.approvals.find("over").settled_at
    for later, left in ((29.9, everything), (30.1, set()), (400, set())):
        monkeypatch.setattr(documents, "_LOOK_SECONDS", 0.0)
        monkeypatch.setattr(documents.time, "time", lambda now=end + later * DAY: now)
        rig.documents.remove_old_files()
        assert stored(rig, "over") == left
        assert stored(rig, "open") == everything
    assert [line.fields["run"] for line in rig.audit.lines() if line.kind == "files_removed"] == [
        "over"
    ]
    assert rig.approvals.find("over").state == "finished"  # what was decided stays known


def test_the_manual_names_every_folder_of_the_state(rig, api):
    rig.approve("r1")
    rig.ask("train", 1)
    page = (ROOT / "docs" / "site.md").read_text()
    folders = {path.name for path in rig.state.iterdir() if path.is_dir()}
    for name in folders | {kind.folder for kind in KINDS} | {CERTIFICATES}:
        assert f"| `{name}/` |" in page
    assert page.count(f"| {KEPT_DAYS} days after the run's end |") == len(KINDS)


def test_the_time_of_a_settlement_that_was_not_written_down_is_that_of_its_file(rig, api):
    """As in the state of an older version."""
    rig.approve("r1")
    rig.double.propose("r1", rig.plan, state="stopped")
    rig.documents.take_plans(api)
    path = rig.state / "plans" / "r1.json"
    content = json.loads(path.read_text())
    del content["settled_at"]
    path.write_text(json.dumps(content))
    os.utime(path, (5.0, 5.0))
    assert rig.approvals.find("r1").settled_at == 5.0


def test_a_certificate_leaves_only_where_the_site_hands_them_in(rig, api):
    def exchange(certificate):
        return DocumentExchange(
            enrolment=rig.enrolment, approvals=rig.approvals, audit=rig.audit,
            books=rig.books, judge=None, settle=lambda entry: None, certificate=certificate,
        )  # fmt: skip

    for run, handing in (("kept", lambda entry: None), ("given", lambda entry: "signed text")):
        rig.approve(run)
        rig.double.propose(run, rig.plan, state="finished")
        for _ in range(2):
            exchange(handing).take_plans(api)
    assert [(c.run, c.certificate) for c in rig.double.certificates] == [("given", "signed text")]
    assert kinds(rig).count("certificate_handed_in") == 1


def test_heads_are_counter_signed_by_both_sides(rig, api):
    rig.approve("r1")
    rig.ask("query.join")
    rig.ask("train", 1)
    rig.documents.exchange_heads(api)
    rig.audit.append("something")
    rig.documents.exchange_heads(api)
    first, second = rig.double.heads
    assert first.yours is None
    # The site has signed what the coordinator showed it the first time.
    shown = AuditHead("coordinator", 1, "ab" * 32)
    assert (second.yours.owner, second.yours.seq, second.yours.hash) == (
        "coordinator",
        1,
        "ab" * 32,
    )
    rig.enrolment.keys.signing.public_key().verify(
        base64.b64decode(second.yours.signature), shown.signed_bytes()
    )
    assert kinds(rig).count("witnessed") == 2
    rig.audit.verify(trusted=rig.double.key.public_key())
    rig.documents.exchange_heads(api)
    assert len(rig.double.heads) == 2  # nothing new was written, nothing is sent


def test_a_counter_signature_over_something_else_is_an_alarm(rig, api, monkeypatch):
    honest = rig.double._route_audit

    def lying(query, body):
        reply = json.loads(honest(query, body))
        reply["yours"]["hash"] = "cd" * 32
        return json.dumps(reply)

    monkeypatch.setattr(rig.double, "_route_audit", lying)
    with pytest.raises(AuditLogDamaged):
        rig.documents.exchange_heads(api)


def test_a_ledger_restored_from_an_old_backup_is_found_at_start(rig, api, tmp_path):
    """Table and head together, as a whole backup brings them: only the counter-signature tells."""
    rig.approve("r1")
    rig.ask("query.join")
    backup = tmp_path / "backup"
    backup.mkdir()
    for name in ("ledger.sqlite", "ledger.sqlite.head"):
        shutil.copy2(rig.state / name, backup / name)
    rig.ask("train", 1)
    rig.documents.exchange_heads(api)
    verify_books(rig.state, rig.audit, trusted=rig.double.key.public_key())
    rig.link.stop.set()
    rig.thread.join(10)
    for name in ("ledger.sqlite", "ledger.sqlite.head"):
        shutil.copy2(backup / name, rig.state / name)
    with pytest.raises(LedgerDamaged, match="counter-signed"):
        verify_books(rig.state, rig.audit, trusted=rig.double.key.public_key())


def test_a_lost_ledger_is_found_at_start(rig, api):
    rig.approve("r1")
    rig.ask("query.join")
    rig.documents.exchange_heads(api)
    (rig.state / "ledger.sqlite").unlink()
    with pytest.raises(LedgerDamaged):
        verify_books(rig.state, rig.audit, trusted=rig.double.key.public_key())


def test_certificates_are_renewed_in_time(rig, api, monkeypatch):
    before = rig.enrolment.certificate
    assert rig.documents.renew_if_due(api) is False
    monkeypatch.setattr(documents, "RENEW_DAYS", 100.0)
    assert rig.documents.renew_if_due(api) is True
    assert rig.enrolment.certificate != before
    assert rig.audit.lines()[-1].kind == "certificate_renewed"


def test_the_difference_between_plans_is_by_key(rig):
    changed = rig.plan.override({"privacy.epsilon": 3.0, "rounds.number": 4})
    assert difference(rig.plan, changed) == [
        ("privacy.epsilon", 4.0, 3.0),
        ("rounds.number", 5, 4),
    ]
    assert difference(rig.plan, rig.plan) == []


def test_old_proposals_are_dropped_but_open_work_is_not(rig, monkeypatch):
    from silotune.client import approvals

    monkeypatch.setattr(approvals, "_MOST_KEPT", 3)
    rig.approve("approved")
    for number in range(6):
        rig.double.propose(f"p{number}", rig.plan)
        rig.take_plans()
    kept = {entry.run for entry in Approvals(rig.state).entries()}
    assert "approved" in kept
    assert len(kept) == 3
