"""A trainer that was taken over, started by the launcher in the place of the honest one.

It confines itself as the honest one does, tries what it should not be able to, and tells how each ended.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from silotune.client.isolation.confinement import confine
from silotune.client.training.child import _confinement


def attempts(asked, scratch):
    """What is tried, by name; each raises an OSError if it is refused."""
    site, base, daemon = Path(asked["site"]), Path(asked["base"]), asked["daemon"]
    proc, listening = Path(f"/proc/{daemon}"), ("127.0.0.1", asked["port"])
    return {
        "open a socket": lambda: socket.socket().close(),
        "open a unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
        "connect": lambda: socket.create_connection(listening, 2),
        "ask the daemon": lambda: socket.socket(socket.AF_UNIX).connect(asked["socket"]),
        "read a key": (site / "state" / "signing.key.sealed").read_bytes,
        "read what opens the keys": (site / "state" / "vault.key").read_bytes,
        "read the ledger": (site / "state" / "ledger.sqlite").read_bytes,
        "read site.toml": (site / "site.toml").read_bytes,
        "read another dataset": (site / "others.csv").read_bytes,
        "list the site's folder": lambda: list(site.iterdir()),
        "read the daemon's environment": (proc / "environ").read_bytes,
        "read the daemon's memory map": (proc / "maps").read_bytes,
        "read the daemon's memory": lambda: (proc / "mem").open("rb").close(),
        "signal the daemon": lambda: os.kill(daemon, 0),
        "signal the launcher": lambda: os.kill(os.getppid(), signal.SIGTERM),
        "write outside its folder": lambda: (site / "note").write_text("x"),
        "make a temporary file elsewhere": lambda: tempfile.mkstemp(dir="/tmp"),
        "change its records": lambda: (site / "notes.csv").write_text("x"),
        "change the base model": lambda: (base / "config.json").write_text("x"),
        "fork": os.fork,
        "start a shell": lambda: subprocess.run(["/bin/sh", "-c", "true"], check=True),
        "become a shell": lambda: os.execv("/bin/sh", ["sh", "-c", "true"]),
        "its own records": (site / "notes.csv").read_bytes,
        "its base model": (base / "config.json").read_bytes,
        "its own folder": lambda: (scratch / "x").write_text("x"),
    }


def ended(action):
    try:
        action()
    except OSError as exc:
        return type(exc).__name__
    return "done"


def main():
    connection = socket.socket(fileno=int(sys.argv[1]))
    with os.fdopen(int(sys.argv[2]), "rb") as pipe:
        bounds = json.loads(pipe.read())
    confine(_confinement(bounds))
    asked = json.loads(connection.recv(1 << 16))
    tried = attempts(asked, Path(bounds["write"][0]))
    told = {
        "ended": {name: ended(action) for name, action in tried.items()},
        "environment": dict(os.environ),
        "descriptors": len([*Path("/proc/self/fd").iterdir()]) - 1,  # one lists them
    }
    connection.sendall(json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    main()
