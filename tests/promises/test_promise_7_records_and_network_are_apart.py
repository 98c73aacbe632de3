"""Promise 7: what reads records can't reach the network; what reaches the network can't read records.

Tried from inside both, as a daemon starts them, on this kernel; docs/security.md says what takes which
kernel. Whatever the trainer answers is in tests/client/training, each layer of its confinement in
tests/client/isolation, and the daemon's memory in tests/e2e.
"""

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
DAEMON_MAY = {"work in its state", "read a key", "open a socket"}
READERS = {
    "torch", "transformers", "peft", "opacus", "scipy", "pandas", "pyarrow", "silotune.data.records",
    "silotune.data.sources", "silotune.client.trainer", "silotune.client.model_cache",
}  # fmt: skip
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
    link = site.state_folder / "daemon.sock"
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.socket(socket.AF_UNIX) as control,
            ours,
            ours.makefile() as answers,
        ):
            control.bind(str(link))
            control.listen()
            with theirs:
                settings = {"work": "train", "style": "text", "level": "info"}
                launcher.start(theirs, model=str(bert_folder), dataset="notes", **settings)
            asked = {"site": str(site.folder), "base": str(bert_folder), "daemon": os.getpid()}
            more = {"port": server.getsockname()[1], "socket": str(link)}
            ours.sendall(json.dumps({**asked, **more}).encode())
            return json.loads(answers.readline())
    finally:
        launcher.close()
        del os.environ["CLINIC_DB_PASSWORD"]


def test_a_trainer_reads_its_records_and_reaches_nothing_else(told):
    done = {name for name, ended in told["ended"].items() if ended == "done"}
    assert done == MAY
    assert set(told["ended"].values()) == {"done", "PermissionError"}
    assert len(told["ended"]) == 25


def test_a_trainer_inherits_no_secret_and_no_way_out(told):
    assert "hunter2" not in str(told["environment"])
    assert told["descriptors"] == 4  # of input, output, log, and its socket
    assert not {"LD_PRELOAD", "CREDENTIALS_DIRECTORY"} & set(told["environment"])


def test_a_daemon_that_is_shut_out_has_the_network_and_the_keys_and_no_record(site, bert_folder):
    script = ["-m", "tests.promises.shut_out_daemon", str(site.file), str(bert_folder)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["why"], told["libraries"], told["trainer"]) == ("", [], "done")
    assert {name for name, ended in told["ended"].items() if ended == "done"} == DAEMON_MAY
    assert set(told["ended"].values()) == {"done", "PermissionError"}
    assert len(told["ended"]) == 13


def test_the_daemons_process_holds_no_library_that_reads_or_trains():
    """Neither at its start nor with what answers messages loaded."""
    modules = "silotune.client.daemon.__main__, silotune.client.site_run, silotune.client.app"
    code = f"import sys, {modules}, silotune.client.training.process; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(found.stdout.split())
    assert "silotune.client.site_run" in loaded
    assert loaded & READERS == set()
