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
from tests.federation import write_federation

READERS = {
    "torch", "transformers", "peft", "opacus", "scipy", "pandas", "pyarrow", "silotune.data.records",
    "silotune.data.sources", "silotune.client.trainer", "silotune.client.model_cache",
}  # fmt: skip


@pytest.fixture
def made(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    found = write_federation(tmp_path / "sites", model, names=("alpha",))
    (found.sites[0].folder / "state").mkdir(mode=0o700)
    return found, model


def test_the_daemons_process_holds_no_library_that_reads_or_trains():
    """Neither at its start nor with what answers messages loaded."""
    modules = "silotune.client.daemon.__main__, silotune.client.site_run, silotune.client.app"
    code = f"import sys, {modules}, silotune.client.training.process; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(found.stdout.split())
    assert "silotune.client.site_run" in loaded
    assert loaded & READERS == set()


def test_a_trainer_that_was_taken_over_gets_out_nowhere(made):
    federation, model = made
    site = federation.sites[0]
    (key := site.state_folder / "vault.key").write_bytes(b"key")
    (other := site.folder / "other.csv").write_text("records of another dataset")
    elsewhere, link = site.folder / "written", site.state_folder / "daemon.sock"
    table = table_of(site, scratch=site.state_folder / "scratch", models=[str(model)])
    launcher = Launcher(table, program="tests.client.attacking_trainer")
    ours, theirs = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as control:
        control.bind(str(link))
        control.listen()
        with theirs:
            settings = {"work": "train", "style": "text", "level": "info"}
            launcher.start(theirs, model=str(model), dataset="notes", **settings)
        targets = {"other": str(other), "key": str(key), "elsewhere": str(elsewhere)}
        more = {"pid": os.getpid(), "port": server.getsockname()[1], "socket": str(link)}
        ours.sendall(json.dumps({**targets, **more}).encode())
        found = json.loads(ours.recv(1 << 16))
    launcher.close()
    done = {what for what, how in found.items() if how == "done"}
    assert done == {"reads its records", "writes its scratch"}
    assert len(found) == 15
    assert not elsewhere.exists()


def test_a_daemon_that_was_taken_over_reads_no_record(made):
    federation, model = made
    script = ["-m", "tests.client.shut_out_daemon", str(federation.sites[0].file), str(model)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *script], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found.pop("why") == ""
    done = {what for what, how in found.items() if how == "done"}
    assert done == {"works in its state", "opens a socket", "the trainer reads them"}
    assert len(found) == 11
