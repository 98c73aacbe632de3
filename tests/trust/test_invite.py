"""Invitation codes: what is written is read, and a slip of the hand is noticed."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.trust.errors import InviteInvalid
from silotune.trust.invite import Invite, secret_digest

AUTHORITY = "ab" * 32


def invite(url="https://coord.example.org:8443"):
    return Invite.new(url=url, authority_fingerprint=AUTHORITY, lifetime=3600)


def test_a_code_reads_back_and_is_short_enough_for_a_message():
    made = invite()
    code = made.encode()
    assert Invite.decode(code) == made
    assert Invite.decode(f"  {code[:30]}\n{code[30:]} ") == made
    assert len(code) < 120
    assert made.expires == pytest.approx(time.time() + 3600, abs=5)


@given(st.integers(0, 200), st.characters(codec="ascii", categories=["Lu", "Ll", "Nd"]))
def test_one_wrong_character_is_noticed(place, character):
    code = Invite(
        url="https://c.example.org:1", authority="cd" * 20, expires=1, secret="00" * 16
    ).encode()
    place = place % len(code)
    typed = code[:place] + character + code[place + 1 :]
    if typed != code:
        try:
            read = Invite.decode(typed)
        except InviteInvalid:
            return
        # Only the unused bits of the last base64 character may differ.
        assert read.encode() == code


def test_every_code_has_a_secret_of_its_own_and_the_digest_hides_it():
    one, other = invite(), invite()
    assert one.secret != other.secret
    assert one.secret_digest == secret_digest(one.secret) != other.secret_digest
    assert one.secret not in one.secret_digest


def test_the_authority_is_compared():
    assert invite().expects(AUTHORITY)
    assert not invite().expects("ac" * 32)


@pytest.mark.parametrize(
    "url",
    [
        "http://coord:1",
        "https://",
        "coord:8443",
        "https://u:p@coord:1",
        "https://c:1/x",
        "https://c:x",
        "https://[::1",
    ],
)
def test_only_a_plain_https_address_is_invited_to(url):
    with pytest.raises(InviteInvalid, match="https://host:port"):
        invite(url)


@pytest.mark.parametrize("code", ["", "silotune1-", "silotune1-AAAA", "silotune1-****", "x" * 500])
def test_what_is_no_code_is_refused(code):
    with pytest.raises(InviteInvalid):
        Invite.decode(code)
