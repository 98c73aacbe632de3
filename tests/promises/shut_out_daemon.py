"""A daemon that was taken over: shut out from the records, it tries to get at them.

Run with a site.toml. It starts its launcher and shuts itself out as a daemon does.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from silotune.client.isolation.shut_out import shut_out
from silotune.client.training.bounds import record_paths, table_of
from silotune.client.training.launcher import Launcher
from silotune.data.site import SiteConfig
from tests.client.attacking_trainer import tried


def main():
    site = SiteConfig.load(Path(sys.argv[1]))
    table = table_of(site, scratch=site.state_folder / "scratch", models=sys.argv[2:])
    launcher = Launcher(table, program="tests.client.attacking_trainer")
    paths = {name: record_paths(site, dataset) for name, dataset in site.datasets.items()}
    why = shut_out(site, records=paths)
    records, model = paths["notes"][0], Path(sys.argv[2]) / "config.json"
    ours, theirs = socket.socketpair()
    settings = {"work": "train", "style": "text", "level": "info", "model": sys.argv[2]}
    with theirs:
        pid = launcher.start(theirs, dataset="notes", **settings)
    memory = Path(f"/proc/{pid}/mem")
    found = {
        "why": why,
        "reads records": tried(records.read_bytes),
        "reads records by a link": tried(Path(f"/proc/self/root{records}").read_bytes),
        "lists their folder": tried(lambda: list(records.parent.iterdir())),
        "reads a base model": tried(model.read_bytes),
        "starts a program that reads them": tried(
            lambda: subprocess.run(["cat", str(records)], check=True, capture_output=True)
        ),
        "reads the trainer's memory": tried(lambda: memory.open("rb").close()),
        "reads through the trainer": tried(Path(f"/proc/{pid}/root{records}").read_bytes),
        "reads through the launcher": tried(Path(f"/proc/{launcher.pid}/root{records}").read_bytes),
        "works in its state": tried(lambda: (site.state_folder / "x").write_bytes(b"x")),
        "opens a socket": tried(lambda: socket.socket(socket.AF_INET).close()),
    }
    targets = dict.fromkeys(("other", "key", "elsewhere", "socket"), str(model))
    ours.sendall(json.dumps({**targets, "pid": os.getpid(), "port": 9}).encode())
    found["the trainer reads them"] = json.loads(ours.recv(1 << 16))["reads its records"]
    launcher.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
