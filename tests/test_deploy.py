"""Service and container files: valid, hardened, and about commands that exist."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from silotune.cli import app

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


class _Unit(configparser.RawConfigParser):
    optionxform = staticmethod(str)


def read(path):
    parser = _Unit(strict=False, comment_prefixes=("#",))
    parser.read_string(path.read_text())
    return parser


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_runs_an_existing_command_and_comes_back_after_a_crash(path):
    service = read(path)["Service"]
    _, *words = service["ExecStart"].split()
    command = get_command(app)
    for word in words[:2]:
        command = command.commands[word]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words[2:] if word.startswith("--")} <= known
    assert service["Restart"] == "always"
    assert service["NoNewPrivileges"] == "yes"
    assert service["User"] != "root"
    assert service["UMask"] == "0077"


def test_a_sites_unit_leaves_its_trainer_the_namespaces_that_it_needs():
    service = read(DEPLOY / "silotune-site.service")["Service"]
    assert service["RestrictNamespaces"].split() == ["user", "net", "ipc"]
    assert "AF_NETLINK" in service["RestrictAddressFamilies"].split()


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_accepts_a_unit(path, tmp_path):
    # The program of the unit is not installed where tests run; everything else is judged.
    text = path.read_text().replace(read(path)["Service"]["ExecStart"], "/bin/true")
    copy = tmp_path / path.name
    copy.write_text(text)
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        assert read(copy)["Install"]["WantedBy"] == "multi-user.target"
        return
    found = subprocess.run(
        [verifier, "verify", str(copy)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "Unknown" not in found.stderr


def test_containers_have_no_rights_and_a_site_has_no_ports():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"coordinator", "site"}
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
    assert "ports" not in services["site"]
    assert "USER silotune" in (DEPLOY / "Containerfile").read_text()
