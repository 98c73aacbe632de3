"""Changing what opens a folder's sealed files: by the command line, on both sides, crashing anywhere."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from silotune import cli
from silotune.client.daemon.books import hold_state
from silotune.client.errors import DaemonRunning, SiteNotEnrolled
from silotune.data.site import SiteConfig
from silotune.errors import FileExposed
from silotune.server.config import Home, load_keys
from silotune.server.coordinator import hold_folder
from silotune.server.errors import CoordinatorRunning
from silotune.trust import vault as sealed
from silotune.trust.audit import AuditLog
from silotune.trust.errors import VaultLocked
from silotune.trust.identity import account_of
from silotune.trust.vault import AtRest, Vault
from tests.client.site_material import write_site_folder

ROOT = Path(__file__).parents[2]
PHRASE = "correct horse battery staple"


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


class CoordinatorSide:
    """A federation as `init` makes it."""

    running = CoordinatorRunning

    def __init__(self, folder, base):
        del base
        self.home = Home(folder / "federation")
        made = invoke(
            "coordinator", "init", "--dir", self.home.root, "--name", "f", "--host", "localhost"
        )
        assert made.exit_code == 0, made.output
        self.config, self.vault_folder = self.home.config_path, self.home.keys
        self.base, self.audit = self.home.root, self.home.audit_path
        self.where = ("--dir", self.home.root)
        self.words = ("coordinator", "reseal", *self.where)

    def at_rest(self):
        return self.home.load().at_rest

    def held(self):
        return hold_folder(self.home.lock_path)

    def opens(self):
        load_keys(self.home, self.vault(), hosts=["localhost"])

    def vault(self):
        return Vault(self.vault_folder, self.at_rest(), base=self.base)


class SiteSide(CoordinatorSide):
    """A site's state with something sealed in it."""

    running = DaemonRunning

    def __init__(self, folder, base):
        self.config = write_site_folder(folder / "sites", base).folder / "site.toml"
        site = SiteConfig.load(self.config)
        self.vault_folder, self.base = site.state_folder, site.folder
        self.audit = site.state_folder / "audit.jsonl"
        AuditLog(self.audit, owner=site.name)
        Vault(self.vault_folder).write(self.vault_folder / "outbox" / "reply", b"reply")
        self.words = ("site", "reseal", "--config", self.config)

    def at_rest(self):
        return SiteConfig.load(self.config).at_rest

    def held(self):
        return os.fdopen(hold_state(self.vault_folder))

    def opens(self):
        assert self.vault().read(self.vault_folder / "outbox" / "reply") == b"reply"


@pytest.fixture(params=[CoordinatorSide, SiteSide], ids=["coordinator", "site"])
def side(request, tmp_path, bert_folder):
    return request.param(tmp_path, bert_folder)


@pytest.fixture
def phrase(tmp_path):
    path = tmp_path / "passphrase"
    path.write_text(PHRASE + "\n")
    path.chmod(0o600)
    return path


def configure(side, **at_rest):
    """As a person edits the configuration."""
    text, mark, _ = side.config.read_text().partition("\n[at_rest]  # of the test")
    lines = [line for line in text.splitlines() if mark or not line.startswith("[at_rest]")]
    table = "".join(f"{key} = {json.dumps(str(value))}\n" for key, value in at_rest.items())
    side.config.write_text("\n".join(lines) + f"\n[at_rest]  # of the test\n{table}")


def kinds(side):
    return [line.kind for line in AuditLog(side.audit).lines()]


def test_a_folder_made_without_a_passphrase_is_opened_by_one_and_then_no_longer_by_its_key_file(
    side, phrase
):
    old = side.vault()
    told = invoke(*side.words, "--passphrase-file", phrase)
    assert told.exit_code == 0, told.exception
    assert f'[at_rest]\npassphrase_file = "{phrase}"' in told.output
    side.opens()  # the configuration still names the key file
    configure(side, passphrase_file=phrase)
    side.opens()
    assert side.vault().end_previous()  # as the next start does
    side.opens()
    with pytest.raises(VaultLocked, match="opened by a passphrase"):
        Vault(side.vault_folder, AtRest(), base=side.base)
    mode = stat.S_IMODE((side.vault_folder / "vault.json").stat().st_mode)
    assert mode == 0o600
    assert PHRASE not in told.output + AuditLog(side.audit).path.read_text()
    line = AuditLog(side.audit).lines()[-1]
    assert (line.kind, line.fields["before"]) == ("resealing", "key file")
    assert line.fields["who"] == account_of(os.getuid()).name
    assert old.opened_by == "key file"


def test_a_crash_anywhere_leaves_a_folder_that_opens(side, phrase, monkeypatch):
    """Before the file is written, between file and configuration, and before the old one ends."""

    def crash(*_, **__):
        raise KeyboardInterrupt

    for target in ("_wrapped", "replace_file"):
        with monkeypatch.context() as patched:
            patched.setattr(sealed, target, crash)
            invoke(*side.words, "--passphrase-file", phrase)
        side.opens()
    assert invoke(*side.words, "--passphrase-file", phrase).exit_code == 0
    side.opens()
    assert invoke(*side.words, "--passphrase-file", phrase).exit_code == 0  # again, from the start
    configure(side, passphrase_file=phrase)
    with monkeypatch.context() as patched:
        patched.setattr(sealed, "replace_file", crash)
        with pytest.raises(KeyboardInterrupt):
            side.vault().end_previous()
    side.opens()
    assert side.vault().end_previous()
    assert not side.vault().end_previous()
    side.opens()


def test_a_start_with_the_old_secret_ends_nothing(side, phrase):
    invoke(*side.words, "--passphrase-file", phrase)
    assert not side.vault().end_previous()
    configure(side, passphrase_file=phrase)
    side.opens()


def test_back_to_a_key_file_on_another_disk_and_from_passphrase_to_passphrase(
    side, phrase, tmp_path
):
    invoke(*side.words, "--passphrase-file", phrase)
    configure(side, passphrase_file=phrase)
    side.vault().end_previous()
    other = tmp_path / "other"
    other.write_text("another passphrase than before\n")
    other.chmod(0o600)
    assert invoke(*side.words, "--passphrase-file", other).exit_code == 0
    side.opens()
    configure(side, passphrase_file=other)
    side.vault().end_previous()
    key = tmp_path / "disk" / "silotune.key"
    found = json.loads(invoke(*side.words, "--key-file", key, "--json").output)
    assert found["at_rest"] == {"key_file": str(key)}
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    configure(side, key_file=key)
    side.opens()


@pytest.mark.parametrize(
    "options", [(), ("--passphrase-env", "X", "--key-file", "k")], ids=["none", "two"]
)
def test_one_secret_has_to_be_named(side, options):
    assert invoke(*side.words, *options).exit_code == 2
    assert "resealing" not in kinds(side)


def test_an_unfit_secret_changes_nothing(side, phrase):
    before = (side.vault_folder / "vault.json").read_bytes()
    phrase.chmod(0o644)
    assert isinstance(invoke(*side.words, "--passphrase-file", phrase).exception, FileExposed)
    phrase.chmod(0o600)
    phrase.write_text("short\n")
    assert isinstance(invoke(*side.words, "--passphrase-file", phrase).exception, VaultLocked)
    assert (side.vault_folder / "vault.json").read_bytes() == before


def test_the_daemon_has_to_be_stopped(side, phrase):
    with side.held():
        result = invoke(*side.words, "--passphrase-file", phrase)
    assert isinstance(result.exception, side.running)


def test_a_site_without_state_is_told_so(tmp_path, bert_folder, phrase):
    config = write_site_folder(tmp_path / "sites", bert_folder).folder / "site.toml"
    result = invoke("site", "reseal", "--config", config, "--passphrase-file", phrase)
    assert isinstance(result.exception, SiteNotEnrolled)


def test_a_federation_is_made_with_a_passphrase_from_the_start(tmp_path, phrase):
    home = Home(tmp_path / "f")
    words = ("--name", "f", "--host", "localhost", "--passphrase-file", phrase)
    assert invoke("coordinator", "init", "--dir", home.root, *words).exit_code == 0
    assert not (home.keys / "vault.key").exists()
    load_keys(home, Vault(home.keys, home.load().at_rest, base=home.root), hosts=["localhost"])


@pytest.mark.slow
def test_by_a_pipe_and_with_the_real_daemon(tmp_path):
    """The service file's recipe on a federation that was made without a passphrase."""
    from tests.e2e.harness import CoordinatorProcess, environment

    daemon = CoordinatorProcess(tmp_path / "federation")
    code = "from silotune.cli import main; main()"
    told = subprocess.run(
        [sys.executable, "-c", code, "coordinator", "reseal", "--dir", str(daemon.folder),
         "--passphrase-file", "/dev/stdin"],
        input=PHRASE, text=True, capture_output=True, env=environment(), check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "passphrase").write_text(PHRASE)
    config = daemon.folder / "coordinator.toml"
    recipe = 'passphrase_file = "${CREDENTIALS_DIRECTORY}/passphrase"'
    config.write_text(config.read_text().replace("[at_rest]", f"[at_rest]\n{recipe}\n#", 1))
    try:
        daemon.up(CREDENTIALS_DIRECTORY=str(credentials))
        assert daemon.audit("resealed")[0]["opened_by"] == "passphrase"
    finally:
        daemon.close()
    daemon.start()  # by hand, without systemd
    try:
        assert daemon.process.wait(timeout=60) == 40
        assert "systemd sets CREDENTIALS_DIRECTORY for its service alone" in daemon.output
    finally:
        daemon.close()
