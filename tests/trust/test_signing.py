"""Claims about a site's signing key."""

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from silotune.errors import EnvironmentFault, FileExposed
from silotune.trust.identity import fingerprint, load_or_create


def test_a_site_keeps_its_key(tmp_path):
    path = tmp_path / "keys" / "signing.key"
    first, again = load_or_create(path), load_or_create(path)
    assert fingerprint(first.public_key()) == fingerprint(again.public_key())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    other = load_or_create(tmp_path / "other.key")
    assert fingerprint(other.public_key()) != fingerprint(first.public_key())


def test_many_processes_that_start_at_once_get_one_key(tmp_path):
    path = tmp_path / "signing.key"
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: load_or_create(path), range(8)))
    assert len({fingerprint(key.public_key()) for key in keys}) == 1


def test_a_key_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "signing.key"
    load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(FileExposed):
        load_or_create(path)


def test_what_is_not_a_signing_key_is_refused(tmp_path):
    path = tmp_path / "signing.key"
    elliptic = generate_private_key(SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    for content in (b"", b"no key", elliptic):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(EnvironmentFault):
            load_or_create(path)
