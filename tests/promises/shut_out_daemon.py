"""A daemon that was taken over: shut out from the records, it tries to get at them.

Run with a site.toml and a base model. It starts its launcher and shuts itself out as a daemon does, and
tells how each attempt ended.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from silotune.client.isolation.shut_out import shut_out
from silotune.client.training.bounds import all_record_paths, table_of
from silotune.client.training.launcher import Launcher
from silotune.data.site import SiteConfig
from tests.promises.curious_trainer import ended


def attempts(site, model, launcher, trainer):
    """What is tried, by name; each raises an OSError if it is refused."""
    records = site.folder / "notes.csv"
    return {
        "read records": records.read_bytes,
        "read records by a link": Path(f"/proc/self/root{records}").read_bytes,
        "read other records": (site.folder / "others.csv").read_bytes,
        "list their folder": lambda: list(records.parent.iterdir()),
        "read a base model": (model / "config.json").read_bytes,
        "start a program that reads them": lambda: subprocess.run(
            ["cat", str(records)], check=True, capture_output=True
        ),
        "become a shell": lambda: os.execv("/bin/sh", ["sh"]),
        "read the trainer's memory": lambda: Path(f"/proc/{trainer}/mem").open("rb").close(),
        "read through the trainer": Path(f"/proc/{trainer}/root{records}").read_bytes,
        "read through the launcher": Path(f"/proc/{launcher}/root{records}").read_bytes,
        "work in its state": lambda: (site.state_folder / "x").write_bytes(b"x"),
        "read a key": (site.state_folder / "signing.key.sealed").read_bytes,
        "open a socket": lambda: socket.socket(socket.AF_INET).close(),
    }


def main():
    site, model = SiteConfig.load(Path(sys.argv[1])), Path(sys.argv[2])
    table = table_of(site, scratch=site.state_folder / "scratch", models=[str(model)])
    launcher = Launcher(table, program="tests.promises.curious_trainer")
    why = shut_out(site, records=all_record_paths(site))
    ours, theirs = socket.socketpair()
    with theirs:
        settings = {"work": "train", "style": "text", "level": "info"}
        trainer = launcher.start(theirs, model=str(model), dataset="notes", **settings)
    tried = attempts(site, model, launcher.pid, trainer)
    found = {name: ended(action) for name, action in tried.items()}
    libraries = [name for name in ("torch", "transformers") if name in sys.modules]
    asked = {"site": str(site.folder), "base": str(model), "daemon": os.getpid()}
    ours.sendall(json.dumps({**asked, "port": 9, "socket": "none"}).encode())
    with ours.makefile() as answers:
        trainers = json.loads(answers.readline())["ended"]["its own records"]
    launcher.close()
    told = {"why": why, "ended": found, "trainer": trainers, "libraries": libraries}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
