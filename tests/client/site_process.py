"""A site as its own process, for tests: made, joined, started, watched and killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
WATCHED = Path(__file__).with_name("watched_site.py")


class SiteProcess:
    """The daemon of one site folder."""

    def __init__(self, folder: Path, *, limits: str = "", **environment):
        self.folder = folder
        self.config = folder / "site.toml"
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.environment = {**os.environ, **own, **environment}
        self.events = folder / "events.jsonl"
        self.limits = limits
        self.process, self.starts = None, 0

    def cli(self, *words, check=True, timeout=120):
        command = [sys.executable, "-c", "from silotune.cli import main; main()", *words]
        found = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment,
        )
        assert not check or found.returncode == 0, found.stdout + found.stderr
        return found

    def site(self, command, *words, **options):
        return self.cli("site", command, *words, "--config", str(self.config), **options)

    def join(self, code):
        return self.site("join", code, "--wait", "30")

    def start(self, *words):
        self.starts += 1
        self.log = (self.folder / f"daemon-{self.starts}.log").open("ab")
        command = [sys.executable, str(WATCHED), str(self.events), self.limits]
        command += ["site", "start", "--config", str(self.config), *words]
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=self.environment
        )
        return self

    def status(self):
        return json.loads(self.site("status", "--json").stdout)

    def wait_online(self, seconds=60.0):
        return self.wait_until(lambda s: s["link"] == "online", seconds=seconds)

    def wait_until(self, wanted, *, seconds=60.0):
        from silotune.client.daemon.socket import ask
        from silotune.client.errors import DaemonAbsent

        ends, found = time.monotonic() + seconds, None
        while time.monotonic() < ends:
            assert self.process.poll() is None, self.output()
            try:
                found = ask(self.folder / "state", "status")
            except DaemonAbsent:
                found = None
            if found is not None and wanted(found):
                return found
            time.sleep(0.05)
        raise AssertionError(f"{found}\n{self.output()}")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def terminate(self, seconds=60.0):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)

    def output(self):
        return (self.folder / f"daemon-{self.starts}.log").read_text(errors="replace")[-6000:]

    def rss_mb(self):
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def watched(self):
        """What the process did: its audit events, see `watched_site`."""
        return [json.loads(line) for line in self.events.read_text().splitlines()]
