"""Claims about files at rest."""

import os
import stat
import subprocess
import sys
import threading

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.errors import FileExposed
from silotune.trust.errors import SealBroken, VaultLocked
from silotune.trust.vault import AtRest, Vault

PASSPHRASE = "correct horse battery staple"


def modes(folder):
    return {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.is_file()
    }


@pytest.fixture(scope="module")
def vault(tmp_path_factory):
    return Vault(tmp_path_factory.mktemp("state"))


@settings(max_examples=40)
@given(st.binary(max_size=200), st.text(min_size=1, max_size=20))
def test_what_is_sealed_opens_again(vault, content, name):
    sealed = vault.seal(content, name=name)
    assert vault.unseal(sealed, name=name) == content
    assert len(content) < 8 or content not in sealed[len(b"silotune sealed 1\n") :]
    assert vault.seal(content, name=name) != sealed


@settings(max_examples=40)
@given(st.integers(min_value=0), st.integers(1, 255))
def test_one_changed_byte_anywhere_is_noticed(vault, position, flip):
    sealed = bytearray(vault.seal(b"adapter", name="a"))
    sealed[position % len(sealed)] ^= flip
    with pytest.raises(SealBroken):
        vault.unseal(bytes(sealed), name="a")


def test_every_prefix_of_a_sealed_file_is_refused(vault):
    sealed = vault.seal(b"adapter", name="a")
    for length in range(len(sealed)):
        with pytest.raises(SealBroken):
            vault.unseal(sealed[:length], name="a")


def test_two_files_can_not_be_exchanged(vault, tmp_path):
    vault.write(tmp_path / "one", b"first")
    vault.write(tmp_path / "two", b"second")
    (tmp_path / "one").replace(tmp_path / "two")
    with pytest.raises(SealBroken, match="two"):
        vault.read(tmp_path / "two")


def test_files_are_private_and_an_open_one_is_refused(tmp_path):
    vault = Vault(tmp_path / "state")
    vault.write(tmp_path / "state" / "secret", b"x")
    assert set(modes(tmp_path / "state").values()) == {0o600}
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    (tmp_path / "state" / "secret").chmod(0o640)
    with pytest.raises(FileExposed):
        vault.read(tmp_path / "state" / "secret")


@pytest.mark.parametrize("name", ["vault.key", "vault.json"])
def test_a_vault_whose_key_others_can_read_is_refused(tmp_path, name):
    Vault(tmp_path)
    (tmp_path / name).chmod(0o644)
    with pytest.raises(FileExposed, match=name):
        Vault(tmp_path)


def test_nothing_of_the_content_or_the_keys_is_on_the_disk_in_clear(tmp_path):
    vault = Vault(tmp_path / "state", AtRest(key_file="../keys/k"), base=tmp_path / "state")
    vault.write(tmp_path / "state" / "adapter", b"the adapter's very bytes")
    for path in (tmp_path / "state").iterdir():
        assert b"very bytes" not in path.read_bytes()
        assert vault._data_key not in path.read_bytes()
    # A stolen disk without the key file: a fresh key does not open it.
    (tmp_path / "keys" / "k").write_bytes(os.urandom(32).hex().encode())
    with pytest.raises(VaultLocked):
        Vault(tmp_path / "state", AtRest(key_file="../keys/k"), base=tmp_path / "state")


def test_a_lost_key_file_is_never_replaced_by_a_new_one(tmp_path):
    Vault(tmp_path)
    (tmp_path / "vault.key").unlink()
    with pytest.raises(VaultLocked, match=r"vault\.key"):
        Vault(tmp_path)
    assert not (tmp_path / "vault.key").exists()


def test_a_passphrase_opens_from_a_file_and_from_the_environment(tmp_path, monkeypatch):
    secret = tmp_path / "passphrase"
    secret.write_text(PASSPHRASE + "\n")
    secret.chmod(0o600)
    first = Vault(tmp_path / "state", AtRest(passphrase_file=str(secret)))
    first.write(tmp_path / "state" / "f", b"content")
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", PASSPHRASE)
    second = Vault(tmp_path / "state", AtRest(passphrase_env="SILOTUNE_PASSPHRASE"))
    assert second.read(tmp_path / "state" / "f") == b"content"
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", PASSPHRASE + "!")
    with pytest.raises(VaultLocked, match="another passphrase"):
        Vault(tmp_path / "state", AtRest(passphrase_env="SILOTUNE_PASSPHRASE"))
    long = tmp_path / "key"
    long.write_text("k" * 64)
    long.chmod(0o600)
    with pytest.raises(VaultLocked, match="opened by a passphrase"):
        Vault(tmp_path / "state", AtRest(key_file=str(long)))


@pytest.mark.parametrize("value", [None, "", "too short"])
def test_a_missing_or_short_passphrase_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.delenv("SILOTUNE_PASSPHRASE", raising=False)
    if value is not None:
        monkeypatch.setenv("SILOTUNE_PASSPHRASE", value)
    with pytest.raises(VaultLocked, match="SILOTUNE_PASSPHRASE"):
        Vault(tmp_path, AtRest(passphrase_env="SILOTUNE_PASSPHRASE"))
    assert not (tmp_path / "vault.json").exists()


def test_a_passphrase_file_that_others_read_is_refused_unless_systemd_guards_it(
    tmp_path, monkeypatch
):
    secret = tmp_path / "credentials" / "passphrase"
    secret.parent.mkdir()
    secret.write_text(PASSPHRASE)
    secret.chmod(0o440)
    with pytest.raises(FileExposed):
        Vault(tmp_path / "state", AtRest(passphrase_file=str(secret)))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(secret.parent))
    how = AtRest(passphrase_file="${CREDENTIALS_DIRECTORY}/passphrase")
    sealed = Vault(tmp_path / "state", how).seal(b"x", name="n")
    assert Vault(tmp_path / "state", how).unseal(sealed, name="n") == b"x"


def test_a_passphrase_comes_by_a_pipe(tmp_path):
    """In a process of its own: a pipe can't be found by its path, and may be another account's."""
    code = (
        "import sys; from pathlib import Path; from silotune.trust.vault import AtRest, Vault;"
        "Vault(Path(sys.argv[1]), AtRest(passphrase_file='/dev/stdin'))"
    )
    given = [sys.executable, "-c", code, str(tmp_path / "state")]
    subprocess.run(given, input=PASSPHRASE + "\n", text=True, check=True)
    secret = tmp_path / "passphrase"
    secret.write_text(PASSPHRASE)
    secret.chmod(0o600)
    assert Vault(tmp_path / "state", AtRest(passphrase_file=str(secret))).seal(b"x", name="n")


def test_a_guess_of_the_passphrase_costs_at_least_32_megabytes(tmp_path, monkeypatch):
    """scrypt needs 128 * n * r bytes (RFC 7914, section 2)."""
    import json

    monkeypatch.setenv("P", PASSPHRASE)
    Vault(tmp_path, AtRest(passphrase_env="P"))
    head = json.loads((tmp_path / "vault.json").read_text())
    assert 128 * head["n"] * head["r"] >= 32 * 2**20


def test_a_vault_file_can_not_ask_for_absurd_memory(tmp_path, monkeypatch):
    import json

    monkeypatch.setenv("P", PASSPHRASE)
    Vault(tmp_path, AtRest(passphrase_env="P"))
    head = json.loads((tmp_path / "vault.json").read_text())
    (tmp_path / "vault.json").write_text(json.dumps({**head, "n": 2**30}))
    with pytest.raises(SealBroken):
        Vault(tmp_path, AtRest(passphrase_env="P"))


def test_two_ways_to_open_a_vault_are_one_too_many():
    with pytest.raises(ValidationError, match="give one of"):
        AtRest(key_file="a", passphrase_env="B")


def test_processes_that_start_at_once_end_up_with_one_key(tmp_path):
    found = []

    def start():
        found.append(Vault(tmp_path).seal(b"x", name="n"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    vault = Vault(tmp_path)
    assert [vault.unseal(sealed, name="n") for sealed in found] == [b"x"] * 8


def test_the_files_are_plain_aes_gcm(tmp_path):
    """Another reader of the format, from its description alone."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    vault = Vault(tmp_path)
    sealed = vault.seal(b"content", name="adapter")
    magic, rest = sealed[:18], sealed[18:]
    key = HKDF(SHA256(), 32, rest[:16], b"file adapter").derive(vault._data_key)
    assert AESGCM(key).decrypt(rest[16:28], rest[28:], magic) == b"content"
