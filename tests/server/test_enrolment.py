"""Letting sites in and out: invitations, six words, certificates, the roster."""

import time

import pytest

from silotune.protocol import http
from silotune.server.errors import NotPossibleNow
from silotune.trust import identity
from silotune.trust.authority import SITE_DAYS
from silotune.trust.errors import InviteInvalid
from silotune.trust.invite import Invite
from silotune.trust.roster import follow
from tests.server.coordinator_material import town

__all__ = ["town"]


def test_a_site_is_in_after_its_request_is_approved_and_not_before(town):
    site = town.invited("alpha")
    reply = site.ask().json()
    assert site.collect().state == "waiting"
    assert town.coordinator.registrar.enrolled == {}
    member = town.coordinator.registrar.approve(site.enrolment)
    assert member.words == reply["words"]
    found = site.collect()
    certificate = identity.certificate_from_pem(found.certificate)
    assert identity.days_left(certificate) == pytest.approx(SITE_DAYS, abs=0.01)
    roster = follow(None, found.rosters, trusted=site.federation_key)
    assert list(roster.active) == ["alpha"]
    assert roster.active["alpha"].certificate == identity.certificate_fingerprint(certificate)


def test_a_code_works_once_but_a_lost_answer_does_no_harm(town):
    site = town.invited("alpha")
    first = site.ask().json()
    assert site.ask().json() == first  # the same request again
    thief = type(site)("alpha", site.invite.encode())
    town.sites.append(thief)
    refused = thief.ask()
    assert (refused.status_code, refused.json()["code"]) == (409, "ST-801")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"name": "beta"}, "ST-802"),  # the certificate request still says alpha
        ({"secret": "0" * 32}, "ST-801"),
        ({"federation": "bank"}, "ST-801"),
        ({"request": "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"}, "ST-802"),
        ({"signing_key": "A" * 43 + "="}, "ST-802"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_request_that_does_not_fit_its_code_is_refused(town, change, code):
    site = town.invited("alpha")
    reply = site.ask(**change)
    assert (reply.status_code, reply.json()["code"]) == (409, code)
    assert town.coordinator.registrar.requests() == []


def test_an_expired_code_is_refused(town):
    registrar = town.coordinator.registrar
    site = type(town.invited("x"))(
        "alpha", registrar.invite("alpha", url=town.coordinator.url, lifetime=0.001)
    )
    town.sites.append(site)
    time.sleep(1.1)
    assert "expired" in site.ask().json()["detail"]


def test_a_refused_site_is_told_why_and_stays_out(town):
    site = town.invited("alpha")
    site.ask()
    town.coordinator.registrar.refuse(site.enrolment, reason="the words differ")
    found = site.collect()
    assert (found.state, found.reason, found.certificate) == ("refused", "the words differ", None)
    with pytest.raises(NotPossibleNow):
        town.coordinator.registrar.approve(site.enrolment)


def test_how_a_request_stands_is_told_only_to_who_made_it(town):
    site, other = town.invited("alpha"), town.invited("beta")
    site.ask()
    other.ask()
    other.enrolment = site.enrolment
    with pytest.raises(Exception, match="state"):
        other.collect()


def test_a_second_site_leaves_the_first_as_it_is(town):
    alpha = town.enrolled("alpha").activate()
    before = town.coordinator.registrar.enrolled["alpha"]
    town.enrolled("beta")
    assert town.coordinator.registrar.enrolled["alpha"] == before
    with alpha.http() as client:
        assert client.get(http.PLANS).status_code == 200


def test_every_change_is_a_roster_that_sites_can_follow(town):
    alpha = town.enrolled("alpha")
    seen = follow(None, alpha.collect().rosters, trusted=alpha.federation_key)
    town.enrolled("beta")
    town.coordinator.registrar.revoke("beta", reason="test")
    with alpha.http() as client:
        reply = client.get(http.ROSTER, params={"after": seen.version})
    rosters = http.parse(http.RosterReply, reply.content).rosters
    newest = follow(seen, rosters, trusted=alpha.federation_key)
    assert newest.version == seen.version + 2
    assert list(newest.active) == ["alpha"]
    assert [m.status for m in newest.members] == ["active", "revoked"]


def test_a_certificate_is_renewed_over_the_same_key_only(town):
    site = town.enrolled("alpha")

    def renew(key, name="alpha", signer=None):
        body = http.RenewRequest.make(
            signer or site.signing,
            name=name,
            request=identity.make_request(name, key),
            sent_at=int(time.time()),
        )
        with site.http() as client:
            return client.post(http.RENEW, content=body.model_dump_json())

    assert renew(identity.new_node_key()).status_code == 409
    assert renew(site.node_key, signer=town.invited("x").signing).status_code == 409
    assert renew(site.node_key, name="beta").status_code == 409
    old = site.certificate
    site.certificate = renew(site.node_key).json()["certificate"]
    assert site.certificate != old
    with site.http() as client:
        assert client.get(http.PLANS).status_code == 200


def test_rotated_keys_replace_the_old_ones_when_approved(town):
    registrar = town.coordinator.registrar
    old = town.enrolled("alpha").activate()
    with pytest.raises(NotPossibleNow, match="not an active"):
        registrar.invite("beta", url=town.coordinator.url, rotate=True)
    with pytest.raises(NotPossibleNow, match="is an active"):
        registrar.invite("alpha", url=town.coordinator.url)
    new = type(old)("alpha", registrar.invite("alpha", url=town.coordinator.url, rotate=True))
    town.sites.append(new)
    assert new.ask().status_code == 200
    with old.http() as client:
        assert client.get(http.PLANS).status_code == 200
    registrar.approve(new.enrolment)
    assert new.collect().state == "approved"
    with old.http() as client:
        assert client.get(http.PLANS).status_code == 403
    assert new.activate().node != old.node


def test_keys_that_the_federation_has_seen_are_not_taken_again(town):
    site = town.enrolled("alpha")
    town.coordinator.registrar.revoke("alpha", reason="test")
    again = town.invited("alpha")
    again.node_key = site.node_key
    reply = again.ask()
    assert (reply.status_code, reply.json()["code"]) == (409, "ST-802")


def test_a_site_can_leave_and_only_by_its_own_signature(town):
    alpha, beta = town.enrolled("alpha"), town.enrolled("beta")

    def leave(site, signer):
        body = http.Leave.make(
            signer.signing, federation="demo", name=site.name, sent_at=int(time.time())
        )
        with site.http() as client:
            return client.post(http.LEAVE, content=body.model_dump_json()).status_code

    assert leave(alpha, beta) == 409
    assert leave(alpha, alpha) == 200
    assert list(town.coordinator.registrar.enrolled) == ["beta"]


def test_the_list_of_sites_survives_a_restart(town):
    site = town.enrolled("alpha").activate()
    before = town.coordinator.registrar.enrolled
    site.hang_up()
    town.restart()
    assert town.coordinator.registrar.enrolled == before
    with site.http() as client:
        assert client.get(http.PLANS).status_code == 200


def test_no_site_can_be_called_like_the_coordinator(town):
    with pytest.raises(InviteInvalid):
        town.coordinator.registrar.invite("coordinator", url=town.coordinator.url)


def test_only_a_digest_of_an_invitations_secret_is_kept(town):
    code = town.coordinator.registrar.invite("alpha", url=town.coordinator.url)
    secret = Invite.decode(code).secret
    for path in town.home.root.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes()
            assert bytes.fromhex(secret) not in path.read_bytes()


def test_news_is_held_until_something_changes(town):
    import threading

    alpha = town.enrolled("alpha")
    with alpha.http() as client:
        now = client.get(http.NEWS).json()
        answers = []
        asked = threading.Thread(
            target=lambda: answers.append(client.get(http.NEWS, params=now).json()), daemon=True
        )
        asked.start()
        time.sleep(0.5)
        assert not answers
        town.enrolled("beta")
        asked.join(timeout=15.0)
    assert answers[0]["roster"] == now["roster"] + 1


def test_audit_heads_are_counter_signed_both_ways(town):
    from silotune.trust.audit import AuditHead, AuditLog

    site = town.enrolled("alpha")
    log = AuditLog(town.home.root / "alpha.jsonl", owner="alpha")
    head = log.append("something")

    def exchange(**fields):
        with site.http() as client:
            return client.post(http.AUDIT, json=fields)

    mine = {"owner": head.owner, "seq": head.seq, "hash": head.hash}
    reply = http.parse(http.HeadExchange, exchange(mine=mine).content)
    import base64

    signature = base64.b64decode(reply.yours.signature)
    log.witness(head, signature, site.federation_key)  # raises if it does not fit
    theirs = AuditHead(reply.mine.owner, reply.mine.seq, reply.mine.hash)
    yours = {
        **reply.mine.model_dump(),
        "signature": base64.b64encode(theirs.sign(site.signing)).decode(),
    }
    assert exchange(mine=mine, yours=yours, after={"log": mine}).status_code == 200
    assert len(town.audit("witnessed")) == 1
    assert len(town.audit("counter_signed")) == 2
    assert exchange(mine={**mine, "owner": "beta"}).status_code == 409
    town.coordinator.audit.verify()
