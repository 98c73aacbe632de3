"""Whoever can change what a site or coordinator obeys, or enter its state, is found before it starts."""

import pytest
from typer.testing import CliRunner

from silotune.cli import app
from silotune.client.daemon.daemon import Daemon
from silotune.client.daemon.doctor import SiteDoctor
from silotune.data.site import SiteConfig, load_guarded
from silotune.errors import FileExposed
from silotune.server.config import Home
from silotune.server.coordinator import Coordinator, create
from silotune.trust.vault import Vault
from tests.client.site_material import write_site_folder


def a_link(folder):
    (folder / "state" / "ledger.sqlite").symlink_to(folder / "elsewhere")


def a_deep_link(folder):
    (folder / "state" / "plans").mkdir()
    (folder / "state" / "plans" / "x").symlink_to("/etc/passwd")


def a_linked_state(folder):
    (folder / "state").rename(folder / "real")
    (folder / "state").symlink_to(folder / "real")


EXPOSED = {
    "a link in the state": a_link,
    "a link deep in the state": a_deep_link,
    "the state is a link": a_linked_state,
    "the state can be read": lambda folder: (folder / "state").chmod(0o750),
    "the configuration can be written": lambda folder: (folder / "site.toml").chmod(0o620),
    "its folder can be written": lambda folder: folder.chmod(0o777),
}


@pytest.mark.parametrize("how", EXPOSED)
def test_an_exposed_site_is_refused_by_every_command_and_told_by_the_doctor(
    tmp_path, bert_folder, how
):
    folder = write_site_folder(tmp_path, bert_folder).folder
    Vault(folder / "state")
    load_guarded(folder / "site.toml")
    EXPOSED[how](folder)
    for words in (["plans"], ["status"], ["approve", "x" * 12], ["start"], ["pause"]):
        result = CliRunner().invoke(app, ["site", *words, "--config", str(folder / "site.toml")])
        assert isinstance(result.exception, FileExposed), words
        assert result.exception.remedy
    site = SiteConfig.load(folder / "site.toml")
    with pytest.raises(FileExposed):
        Daemon(site)
    found = {finding.check: finding for finding in SiteDoctor(site).examine()}
    assert found["files"].code == "ST-409"


def test_a_configuration_that_is_a_link_to_a_safe_file_is_fine(tmp_path, bert_folder):
    folder = write_site_folder(tmp_path, bert_folder).folder
    (folder / "site.toml").rename(folder / "managed.toml")
    (folder / "site.toml").symlink_to(folder / "managed.toml")
    load_guarded(folder / "site.toml")
    (folder / "managed.toml").chmod(0o666)
    with pytest.raises(FileExposed):
        load_guarded(folder / "site.toml")


def test_simulated_sites_may_lie_in_a_shared_folder(tmp_path, bert_folder):
    folder = write_site_folder(tmp_path, bert_folder).folder
    (folder / "site.toml").chmod(0o664)
    SiteConfig.load(folder / "site.toml")


@pytest.mark.parametrize(
    "expose",
    [
        lambda root: (root / "state" / "x").symlink_to("/etc/passwd"),
        lambda root: root.chmod(0o755),
        lambda root: (root / "coordinator.toml").chmod(0o666),
    ],
)
def test_an_exposed_coordinator_does_not_start(tmp_path, expose):
    home = Home(tmp_path / "c")
    create(home, name="f", hosts=["localhost"], listen="127.0.0.1", port=0)
    expose(home.root)
    with pytest.raises(FileExposed):
        Coordinator(home)
