"""A trainer that was taken over: confined as every one is, it tries the ways out, and tells what it got.

Started by the launcher in the place of the honest one; one question, `AskWeights` with nothing in it,
makes it try. What to try stands in a file beside its records, ``targets.json``.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from silotune.client.isolation.confinement import confine
from silotune.client.training.child import _confinement


def tried(what):
    try:
        what()
    except OSError as exc:
        return f"refused: {type(exc).__name__}"
    return "done"


def main():
    connection = socket.socket(fileno=int(sys.argv[1]))
    with os.fdopen(int(sys.argv[2]), "rb") as pipe:
        bounds = json.loads(pipe.read())
    confine(_confinement(bounds))
    records = Path(next(path for path in bounds["read"] if path.endswith(".csv")))
    targets = json.loads(connection.recv(1 << 16))
    scratch, memory = Path(bounds["write"][0]), Path(f"/proc/{targets['pid']}/mem")
    found = {
        "reads its records": tried(records.read_bytes),
        "writes its scratch": tried(lambda: (scratch / "x").write_bytes(b"x")),
        "writes its records": tried(lambda: records.write_bytes(b"x")),
        "reads another dataset": tried(Path(targets["other"]).read_bytes),
        "reads a key": tried(Path(targets["key"]).read_bytes),
        "reads the daemon's environment": tried(Path(f"/proc/{targets['pid']}/environ").read_bytes),
        "reads the daemon's memory": tried(lambda: memory.open("rb").close()),
        "writes elsewhere": tried(lambda: Path(targets["elsewhere"]).write_bytes(b"x")),
        "makes a temporary file elsewhere": tried(lambda: tempfile.mkstemp(dir="/tmp")),
        "opens a socket": tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)),
        "connects": tried(lambda: socket.create_connection(("127.0.0.1", targets["port"]), 2)),
        "asks the daemon": tried(
            lambda: socket.socket(socket.AF_UNIX).connect(targets["socket"])
        ),
        "starts a shell": tried(lambda: subprocess.run(["/bin/sh", "-c", "true"], check=True)),
        "forks": tried(os.fork),
        "signals the daemon": tried(lambda: os.kill(targets["pid"], 0)),
    }  # fmt: skip
    connection.sendall(json.dumps(found).encode())


if __name__ == "__main__":
    main()
