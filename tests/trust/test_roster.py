"""The chain of rosters: signed, in order, and no way back."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from silotune.trust import identity
from silotune.trust.errors import RosterInvalid
from silotune.trust.roster import Roster, RosterEntry, SignedRoster, follow

KEY = Ed25519PrivateKey.generate()
TRUSTED = KEY.public_key()


def member(name, **changes):
    return RosterEntry(
        name=name,
        signing_key=identity.encode_signing_key(Ed25519PrivateKey.generate().public_key()),
        node_key=identity.public_pem(identity.new_node_key().public_key()),
        certificate="0" * 64,
        **changes,
    )


@pytest.fixture(scope="module")
def history():
    first = Roster(federation="icu", version=1, previous="", issued_at=1)
    alpha, beta = member("alpha"), member("beta")
    second = first.successor(members=[beta, alpha], issued_at=2)
    gone = alpha.model_copy(update={"status": "revoked"})
    third = second.successor(members=[gone, beta], issued_at=3)
    return [first, second, third]


def signed(*rosters):
    return [SignedRoster.sign(roster, KEY) for roster in rosters]


def test_a_newcomer_and_a_late_reader_arrive_at_the_same_roster(history):
    assert follow(None, signed(*history), trusted=TRUSTED) == history[-1]
    assert follow(history[0], signed(*history[1:]), trusted=TRUSTED) == history[-1]
    assert follow(history[2], signed(history[2]), trusted=TRUSTED) == history[-1]
    assert follow(history[1], [], trusted=TRUSTED) == history[1]


def test_a_revoked_site_is_listed_and_not_active(history):
    assert [m.name for m in history[2].members] == ["alpha", "beta"]
    assert list(history[2].active) == ["beta"]


def test_a_gap_a_way_back_and_another_history_are_refused(history):
    first, second, third = history
    with pytest.raises(RosterInvalid, match="3 was offered after version 1"):
        follow(first, signed(third), trusted=TRUSTED)
    with pytest.raises(RosterInvalid, match="1 was offered after version 3"):
        follow(third, signed(first), trusted=TRUSTED)
    fork = first.successor(members=[member("mallory")], issued_at=2)
    with pytest.raises(RosterInvalid, match="2 was offered after version 2"):
        follow(second, signed(fork), trusted=TRUSTED)
    with pytest.raises(RosterInvalid, match="another history"):
        follow(fork, signed(third), trusted=TRUSTED)


def test_another_federations_roster_is_refused(history):
    other = Roster(federation="bank", version=4, previous=history[2].sha256, issued_at=4)
    with pytest.raises(RosterInvalid, match="another federation"):
        follow(history[2], signed(other), trusted=TRUSTED)


def test_a_changed_or_foreign_signature_is_refused(history):
    (good,) = signed(history[1])
    changed = good.model_copy(update={"roster": good.roster.replace('"alpha"', '"alphb"')})
    foreign = SignedRoster.sign(history[1], Ed25519PrivateKey.generate())
    loose = SignedRoster(roster=good.roster + " ", signature=good.signature)
    for bad in (changed, foreign, loose):
        with pytest.raises(RosterInvalid):
            bad.verify(TRUSTED)


def test_signed_text_must_be_the_canonical_form(history):
    import base64

    text = history[0].canonical().replace(",", ", ")
    signature = base64.b64encode(KEY.sign(b"silotune roster v1\0" + text.encode())).decode()
    with pytest.raises(RosterInvalid, match="canonical"):
        SignedRoster(roster=text, signature=signature).verify(TRUSTED)


def test_names_are_sorted_and_unique():
    twice = (member("alpha"), member("alpha"))
    with pytest.raises(ValidationError, match="listed twice"):
        Roster(federation="icu", version=1, previous="", issued_at=1, members=twice)
    with pytest.raises(ValidationError, match="predecessor"):
        Roster(federation="icu", version=2, previous="", issued_at=1)
