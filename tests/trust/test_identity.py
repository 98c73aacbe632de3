"""Keys, certificates and words, checked with OpenSSL's own verifier and Python's TLS."""

import re
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    uses_nist_ec_curve,
)

from silotune.trust import identity
from silotune.trust.authority import SITE_DAYS, Authority
from silotune.trust.errors import IdentityInvalid
from silotune.trust.identity import Subject


@pytest.fixture(scope="module")
def authority():
    return Authority.create("icu")


def site_certificate(authority, name="alpha", **settings):
    key = identity.new_node_key()
    request = identity.make_request(name, key)
    certificate = authority.issue_client(
        request, subject=Subject(name=name, role="site"), **settings
    )
    return key, certificate


def openssl_verify(tmp_path, authority, certificate, *options):
    (tmp_path / "ca.pem").write_text(identity.chain_pem([authority.certificate]))
    (tmp_path / "leaf.pem").write_text(identity.chain_pem([certificate]))
    command = ["openssl", "verify", "-x509_strict", "-CAfile", tmp_path / "ca.pem", *options]
    return subprocess.run(
        [*command, tmp_path / "leaf.pem"], capture_output=True, text=True, check=False
    )


def test_openssl_accepts_a_sites_certificate_for_clients_and_not_for_servers(tmp_path, authority):
    _, certificate = site_certificate(authority)
    assert openssl_verify(tmp_path, authority, certificate, "-purpose", "sslclient").returncode == 0
    refused = openssl_verify(tmp_path, authority, certificate, "-purpose", "sslserver")
    assert refused.returncode != 0


def test_openssl_accepts_the_servers_certificate_under_each_of_its_hosts(tmp_path, authority):
    key = identity.new_node_key().public_key()
    certificate = authority.issue_server(key, hosts=["coord.example.org", "127.0.0.1"])
    for option in (["-verify_hostname", "coord.example.org"], ["-verify_ip", "127.0.0.1"]):
        found = openssl_verify(tmp_path, authority, certificate, "-purpose", "sslserver", *option)
        assert found.returncode == 0, found.stderr
    other = openssl_verify(tmp_path, authority, certificate, "-verify_hostname", "evil.org")
    assert other.returncode != 0


def test_another_authority_of_the_same_name_is_not_believed(authority):
    _, certificate = site_certificate(authority)
    assert identity.issued_by(certificate, authority.certificate)
    assert not identity.issued_by(certificate, Authority.create("icu").certificate)


def test_an_expired_certificate_is_not_believed(authority):
    _, certificate = site_certificate(authority, days=-0.01)
    assert identity.days_left(certificate) < 0
    assert not identity.issued_by(certificate, authority.certificate)


def test_a_site_certificate_lasts_ninety_days_and_bears_name_role_and_key(authority):
    key, certificate = site_certificate(authority)
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    assert abs(left - timedelta(days=SITE_DAYS)) < timedelta(minutes=1)
    assert identity.subject_of(certificate) == Subject(name="alpha", role="site")
    assert identity.key_of(certificate) == identity.public_pem(key.public_key())


def test_a_request_for_another_name_is_refused(authority):
    request = identity.make_request("beta", identity.new_node_key())
    with pytest.raises(IdentityInvalid, match="another name"):
        authority.issue_client(request, subject=Subject(name="alpha", role="site"))


def test_a_request_over_a_weaker_curve_is_refused():
    builder = x509.CertificateSigningRequestBuilder().subject_name(identity.common_name("alpha"))
    request = builder.sign(generate_private_key(SECP256R1()), hashes.SHA256())
    pem = request.public_bytes(identity.Encoding.PEM).decode()
    with pytest.raises(IdentityInvalid, match="P-384"):
        identity.read_request(pem, name="alpha")


@pytest.mark.parametrize("pem", ["", "x", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"])
def test_rubbish_in_place_of_a_request_is_refused(pem):
    with pytest.raises(IdentityInvalid):
        identity.read_request(pem, name="alpha")


def test_a_server_certificate_says_no_client_role(authority):
    certificate = authority.issue_server(
        identity.new_node_key().public_key(), hosts=["coord.example.org"]
    )
    with pytest.raises(IdentityInvalid):
        identity.subject_of(certificate)


def test_node_keys_are_in_the_form_that_flower_reads():
    key = identity.new_node_key()
    assert bytes_to_private_key(identity.private_pem(key)).private_numbers() == (
        key.private_numbers()
    )
    public = bytes_to_public_key(identity.public_pem(key.public_key()).encode())
    assert uses_nist_ec_curve(public)
    assert identity.node_key_from_pem(identity.private_pem(key)).key_size == 384


def test_signing_keys_survive_their_text_and_nothing_else_does():
    public = Ed25519PrivateKey.generate().public_key()
    assert identity.decode_signing_key(identity.encode_signing_key(public)) == public
    for text in ("", "AAAA", "%" * 44):
        with pytest.raises(IdentityInvalid):
            identity.decode_signing_key(text)


def test_six_words_change_with_every_part_and_can_be_said_aloud():
    parts = {"name": "alpha", "signing_key": "k1", "node_key": "n1"}
    words = identity.six_words(**parts)
    assert re.fullmatch(r"([bdfghj-np-tvz][aiou][bdfghj-np-tvz][aiou][bdfghj-np-tvz]-?){6}", words)
    others = {identity.six_words(**{**parts, key: "z"}) for key in parts}
    assert len({words, *others}) == 4


def test_proquints_are_those_of_the_specification():
    # 127.0.0.1 is "lusab-babad" in arXiv:0901.4016.
    assert identity._proquint(bytes([127, 0])) == "lusab"
    assert identity._proquint(bytes([0, 1])) == "babad"
    assert identity._proquint(bytes([63, 84])) == "gutih"
