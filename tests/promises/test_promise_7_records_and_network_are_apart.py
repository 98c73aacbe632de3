"""Promise 7: what reads records can't reach the network; what reaches the network can't read records."""

import json
import os
import socket
import subprocess
import sys

import pytest

from silotune.client.training.bounds import table_of
from silotune.client.training.launcher import Launcher
from silotune.data.site import SiteConfig
from silotune.trust.vault import Vault
from tests.client.site_material import write_site_folder

MAY = {"its own records", "its base model", "its own folder"}
OTHERS = """
[datasets.others]
format = "csv"
path = "others.csv"
declared_units = 10
[datasets.others.columns]
text = "note"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory, bert_folder):
    """A site with keys, two datasets and a policy."""
    folder = write_site_folder(tmp_path_factory.mktemp("p7"), bert_folder).folder
    config = folder / "site.toml"
    config.write_text(config.read_text().replace("[policy]", OTHERS + "[policy]", 1))
    (folder / "others.csv").write_text("note\na\n")
    site = SiteConfig.load(config)
    state = site.state_folder
    state.mkdir(mode=0o700)
    Vault(state)
    for name in ("signing.key.sealed", "ledger.sqlite"):
        (state / name).write_text("private")
        (state / name).chmod(0o600)
    return site


@pytest.fixture(scope="module")
def told(site, bert_folder):
    """What a trainer taken over says that it could do; the process that runs the tests is its daemon."""
    os.environ["CLINIC_DB_PASSWORD"] = "hunter2"
    launcher = Launcher(
        table_of(site, scratch=site.state_folder / "scratch"),
        program="tests.promises.curious_trainer",
    )
    ours, theirs = socket.socketpair()
    try:
        with ours, theirs, ours.makefile() as answers:
            launcher.start(
                theirs,
                work="train",
                model=str(bert_folder),
                dataset="notes",
                style="text",
                level="info",
            )
            theirs.close()
            asked = {"site": str(site.folder), "base": str(bert_folder), "daemon": os.getpid()}
            ours.sendall(json.dumps(asked).encode())
            return json.loads(answers.readline())
    finally:
        launcher.close()
        del os.environ["CLINIC_DB_PASSWORD"]


def test_a_trainer_reads_its_records_and_reaches_nothing_else(told):
    done = {name for name, ended in told["ended"].items() if ended == "done"}
    assert done == MAY
    assert set(told["ended"].values()) == {"done", "PermissionError"}


def test_a_trainer_inherits_no_secret_and_no_way_out(told):
    assert "hunter2" not in str(told["environment"])
    assert told["descriptors"] == 4  # of input, output, log, and its socket
    assert not {"LD_PRELOAD", "CREDENTIALS_DIRECTORY"} & set(told["environment"])


SHUT_OUT = """
import json, os, socket, sys
from pathlib import Path
from silotune.client.isolation.shut_out import shut_out
from silotune.client.training.bounds import record_paths
from silotune.data.site import SiteConfig
site = SiteConfig.load(Path(sys.argv[1]))
records = {name: record_paths(site, dataset) for name, dataset in site.datasets.items()}
said = shut_out(site, records=records)
tried = {
    "records": lambda: (site.folder / "notes.csv").read_bytes(),
    "other records": lambda: (site.folder / "others.csv").read_bytes(),
    "base model": lambda: (Path(sys.argv[2]) / "config.json").read_bytes(),
    "shell": lambda: os.execv("/bin/sh", ["sh"]),
    "socket": lambda: socket.socket().close(),
    "key": lambda: (site.state_folder / "signing.key.sealed").read_bytes(),
}
ended = {}
for name, action in tried.items():
    try:
        action()
        ended[name] = "done"
    except OSError as exc:
        ended[name] = type(exc).__name__
print(json.dumps([said, ended, [name for name in ("torch", "transformers") if name in sys.modules]]))
"""


def test_a_daemon_that_is_shut_out_has_the_network_and_the_keys_and_no_record(site, bert_folder):
    command = [sys.executable, "-c", SHUT_OUT, str(site.file), str(bert_folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    said, ended, libraries = json.loads(ran.stdout)
    assert said == ""
    assert libraries == []
    refused = dict.fromkeys(("records", "other records", "base model", "shell"), "PermissionError")
    assert ended == {**refused, "socket": "done", "key": "done"}
