"""Joining: trust starts from the invitation, keys stay here, and nothing false is believed."""

import socket
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.client.daemon.enrolment import Enrolment, Joining
from silotune.client.errors import EnrolmentRefused, SiteNotEnrolled
from silotune.data.site import SiteConfig
from silotune.errors import EnvironmentFault
from silotune.protocol import http
from silotune.protocol.errors import CoordinatorUnavailable, ServerUntrusted
from silotune.trust.audit import AuditLog
from silotune.trust.authority import Authority
from silotune.trust.errors import IdentityInvalid, InviteInvalid, RosterInvalid
from silotune.trust.identity import Subject, chain_pem, make_request, new_node_key
from silotune.trust.invite import Invite
from silotune.trust.roster import SignedRoster
from silotune.trust.vault import Vault
from tests.client.coordinator_double import CoordinatorDouble
from tests.client.site_material import write_site_folder


@pytest.fixture
def double(tmp_path):
    with CoordinatorDouble(tmp_path / "coordinator") as double:
        yield double


@pytest.fixture
def site(tmp_path, bert_folder):
    return SiteConfig.load(write_site_folder(tmp_path / "s", bert_folder).folder / "site.toml")


def joined(site, double):
    joining = Joining(site, double.invitation())
    joining.ask()
    return joining.wait(seconds=5)


def test_a_joined_site_is_read_back_whole(site, double):
    enrolment = joined(site, double)
    again = Enrolment.open(site, Vault(site.state_folder))
    assert again.facts == enrolment.facts
    assert again.roster.active["alpha"].words == Joining_words(again)
    again.require_listed()
    lines = [line.kind for line in AuditLog(site.state_folder / "audit.jsonl").lines()]
    assert lines == ["opened", "joined"]


def Joining_words(enrolment):
    return enrolment.roster.active[enrolment.facts.site].words


def test_private_keys_are_sealed_and_never_leave(site, double, monkeypatch):
    seen = []
    double.hook = lambda path, body: seen.append(body)
    enrolment = joined(site, double)
    private = enrolment.keys.signing.private_bytes_raw()
    number = enrolment.keys.node.private_numbers().private_value.to_bytes(48, "big")
    for content in [*seen, *(p.read_bytes() for p in site.state_folder.rglob("*") if p.is_file())]:
        assert private not in content
        assert number not in content
        assert b"PRIVATE KEY" not in content
    for path in site.state_folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_another_authority_than_the_one_that_invited_is_not_believed(site, double):
    invite = Invite.new(url=double.url, authority_fingerprint="ab" * 32, lifetime=60).encode()
    with pytest.raises(InviteInvalid, match="not the authority that invited"):
        Joining(site, invite).ask()
    assert double._enrolled == {}


def test_a_server_that_only_shows_the_right_authority_is_not_believed(site, double, tmp_path):
    """It can copy the certificate of the authority, but not serve with a certificate of it."""
    with CoordinatorDouble(tmp_path / "impostor") as impostor:
        impostor._route_authority = double._route_authority
        right = double.invitation()
        invite = Invite.decode(right)
        moved = Invite(
            url=impostor.url,
            authority=invite.authority,
            expires=invite.expires,
            secret=invite.secret,
        )
        with pytest.raises(ServerUntrusted):
            Joining(site, moved.encode()).ask()
        assert impostor._enrolled == {}


@pytest.mark.parametrize("code", ["", "silotune1-", "silotune1-AAAA", "hello"])
def test_a_damaged_code_is_refused_before_any_connection(site, code):
    with pytest.raises(InviteInvalid):
        Joining(site, code)


def test_other_words_mean_other_keys(site, double):
    enrol = double._route_enrol

    def lying(query, body):
        enrol(query, body)
        return http.EnrolReply(enrolment="0" * 32, words="babab-" * 5 + "babab").model_dump_json()

    double._route_enrol = lying
    with pytest.raises(IdentityInvalid, match="other keys"):
        Joining(site, double.invitation()).ask()


def answer_with(double, **changes):
    honest = double._route_enrolment

    def changed(query, body):
        reply = http.EnrolmentReply.model_validate_json(honest(query, body))
        return reply.model_copy(update=changes).model_dump_json()

    double._route_enrolment = changed


def certificate_of(authority, name):
    key = new_node_key()
    issued = authority.issue_client(
        make_request(name, key), subject=Subject(name=name, role="site")
    )
    return chain_pem([issued])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (lambda d: {"certificate": certificate_of(d.authority, "alpha")}, IdentityInvalid),
        (lambda d: {"certificate": certificate_of(d.authority, "beta")}, IdentityInvalid),
        (
            lambda d: {"certificate": certificate_of(Authority.create("x"), "alpha")},
            IdentityInvalid,
        ),
        (lambda d: {"certificate": None}, IdentityInvalid),
        (lambda d: {"rosters": ()}, RosterInvalid),
        (lambda d: {"rosters": tuple(d.signed_rosters[:1])}, RosterInvalid),
        (
            lambda d: {"rosters": (SignedRoster.sign(d.roster, Ed25519PrivateKey.generate()),)},
            RosterInvalid,
        ),
    ],
    ids=["other key", "other name", "other authority", "none", "no roster", "without us", "forged"],
)
def test_an_approval_that_does_not_fit_is_not_believed(site, double, changes, error):
    joining = Joining(site, double.invitation())
    joining.ask()
    answer_with(double, **changes(double))
    with pytest.raises(error):
        joining.wait(seconds=5)
    with pytest.raises(SiteNotEnrolled):
        Enrolment.open(site, Vault(site.state_folder))


def test_a_refusal_is_told_with_its_reason(site, double):
    joining = Joining(site, double.invitation())
    joining.ask()
    answer_with(double, state="refused", reason="we do not know you")
    with pytest.raises(EnrolmentRefused, match="we do not know you"):
        joining.wait(seconds=5)


def test_waiting_ends_and_is_taken_up_again_with_the_same_keys(site, double):
    joining = Joining(site, double.invitation())
    joining.ask()
    honest = double._route_enrolment
    double._route_enrolment = lambda q, b: http.EnrolmentReply(state="waiting").model_dump_json()
    assert joining.wait(seconds=0) is None
    double._route_enrolment = honest
    later = Joining(site, double.invitation())
    assert later.words == joining.words
    assert later.wait(seconds=5).facts.site == "alpha"


def test_a_coordinator_that_is_away_for_a_while_is_asked_again(site, double, monkeypatch):
    monkeypatch.setattr("silotune.client.daemon.enrolment._POLL_SECONDS", 0.01)
    joining = Joining(site, double.invitation())
    joining.ask()
    double.hook = lambda path, body: (503, b"", {})
    with pytest.raises(CoordinatorUnavailable):
        joining.wait(seconds=0)

    def hang_up(handler):
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    answers = iter([(0, hang_up, {}), (503, b"", {})])
    double.hook = lambda path, body: next(answers, None)
    assert joining.wait(seconds=30).facts.site == "alpha"
    assert next(answers, None) is None


def test_a_site_is_in_one_federation(site, double):
    joined(site, double)
    with pytest.raises(EnvironmentFault, match="already"):
        Joining(site, double.invitation())


def test_a_certificate_that_was_exchanged_is_noticed(site, double):
    joined(site, double)
    (site.state_folder / "certificate.pem").write_text(certificate_of(double.authority, "alpha"))
    with pytest.raises(IdentityInvalid, match="another key"):
        Enrolment.open(site, Vault(site.state_folder))


def test_the_renamed_site_has_to_join_again(site, double):
    joined(site, double)
    renamed = site.model_copy(update={"name": "omega"})
    renamed._folder = site.folder
    with pytest.raises(SiteNotEnrolled, match="omega"):
        Enrolment.open(renamed, Vault(site.state_folder))
