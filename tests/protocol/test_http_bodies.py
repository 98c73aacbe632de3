"""Bodies of the routes: strict, bounded, and signed where somebody's word is in them."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.protocol import http
from silotune.trust.errors import BodyInvalid

KEY = Ed25519PrivateKey.generate()


def decision(**changes):
    given = {
        "federation": "icu",
        "site": "alpha",
        "run": "r-1",
        "plan_sha256": "0" * 64,
        "verdict": "approved",
        "decided_at": 7,
    }
    return http.Decision.make(KEY, **{**given, **changes})


def test_a_decision_survives_the_wire_and_its_signature_with_it():
    made = decision()
    read = http.parse(http.Decision, made.model_dump_json().encode())
    assert read == made
    assert read.verified(KEY.public_key())
    assert not read.verified(Ed25519PrivateKey.generate().public_key())


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "rejected"},
        {"plan_sha256": "1" * 64},
        {"run": "r-2"},
        {"site": "beta"},
        {"federation": "bank"},
        {"reason": "x"},
        {"decided_at": 8},
    ],
    ids=str,
)
def test_every_field_of_a_decision_is_signed(change):
    assert not decision().model_copy(update=change).verified(KEY.public_key())


def test_one_kind_of_body_is_no_signature_for_another():
    class Other(http.Decision):
        pass

    assert decision().verified(KEY.public_key())
    assert not Other.model_validate(decision().model_dump()).verified(KEY.public_key())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"status": "failed"}',
        b'{"status": "done", "more": 1}',
        b'{"status": 1}',
        b"[" * 10_000,
    ],
)
def test_what_is_not_of_the_schema_is_refused(text):
    with pytest.raises(BodyInvalid, match="Done"):
        http.parse(http.Done, text)


def test_a_body_over_the_limit_is_refused_before_it_is_read():
    with pytest.raises(BodyInvalid, match="more than 10"):
        http.parse(http.Done, b'{"status": "done"}', limit=10)


def test_a_refusal_of_a_body_never_quotes_its_values():
    text = b'{"enrolment": "patient 4711", "sent_at": "x", "signature": "y"}'
    with pytest.raises(BodyInvalid) as caught:
        http.parse(http.EnrolmentQuery, text)
    assert "4711" not in caught.value.detail
    assert "enrolment" in caught.value.detail


@pytest.mark.parametrize("name", ["", "../x", "Ärzte", "a" * 64, "a b", "A"])
def test_names_that_could_be_paths_or_markup_are_refused(name):
    with pytest.raises(ValueError, match="site"):
        decision(site=name)
