"""What a deployment costs without any training: latency of an exchange, idle load, memory.

One coordinator (the real command) and sites as processes of their own, over TLS on loopback. The sites
of the latency part answer with constants, so that all that is measured is the way there and back: a
2 MB adapter out and a 2 MB update in, sealed, signed, stored and acknowledged.

    python benchmarks/deployment.py [--quick] [--json]
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.harness import CoordinatorProcess, environment, wait_for  # noqa: E402

VALUES = 512 * 1024  # of float32: 2 MB
SITE = """
name = "{name}"
[datasets.d]
format = "csv"
path = "d.csv"
unit = "record"
declared_units = 100
[datasets.d.columns]
text = "t"
label = "l"
"""
PLAN = """
[plan]
name = "noop"
purpose = "measures the way of a message"
seed = 1
[model]
base = "x"
task = "text_classification"
labels = ["a", "b"]
[data]
dataset = "d"
[rounds]
number = {rounds}
min_sites = {sites}
deadline = 300.0
[privacy]
mode = "none"
rate = 0.1
"""


class Sites:
    """No-op sites as processes."""

    def __init__(self, folder, coordinator, count):
        self.processes = []
        names = [f"site{number}" for number in range(count)]
        for name in names:
            home = folder / name
            home.mkdir()
            (home / "site.toml").write_text(SITE.format(name=name))
            (home / "site.toml").chmod(0o600)
            words = [ROOT / "benchmarks" / "deployment_site.py", home, coordinator.invite(name)]
            log = (folder / f"{name}.log").open("wb")
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, words), str(VALUES)],
                    env=environment(),
                    stdout=log,
                    stderr=log,
                )
            )
        rows = wait_for(
            lambda: _all(coordinator, count), seconds=300, what="all requests", every=0.5
        )
        for row in rows:
            coordinator.admin.post(f"/requests/{row['request']}/approve")
        wait_for(
            lambda: sum(r["online"] for r in coordinator.admin.get("/sites")) == count,
            seconds=300,
            what="all sites online",
            every=0.5,
        )

    def close(self):
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _all(coordinator, count):
    rows = [r for r in coordinator.admin.get("/requests") if r["state"] == "waiting"]
    return rows if len(rows) == count else None


def exchange(folder, *, sites, rounds):
    """Seconds of a round without training, and the coordinator's CPU and memory for it."""
    coordinator = CoordinatorProcess(folder / "exchange").up()
    made = Sites(folder, coordinator, sites)
    try:
        process = psutil.Process(coordinator.process.pid)
        plan = folder / "plan.toml"
        plan.write_text(PLAN.format(rounds=rounds, sites=sites))
        before = process.cpu_times()
        idle = process.memory_info().rss
        run = coordinator.cli("run", plan)["run"]
        row = coordinator.wait_over(run, seconds=900)
        assert row["state"] == "finished", row
        after = process.cpu_times()
        finished = coordinator.events(run, "round_finished")
        seconds = [event["seconds"] for event in finished]
        cpu = (after.user + after.system - before.user - before.system) / (rounds + 1)
        return {
            "sites": sites,
            "adapter_mb": VALUES * 4 / 1e6,
            "seconds_median": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "coordinator_cpu_seconds_per_exchange": cpu,
            "coordinator_mb_idle": idle / 1e6,
            "coordinator_mb_after": process.memory_info().rss / 1e6,
        }
    finally:
        made.close()
        coordinator.close()


def idle(folder, *, sites, seconds):
    """Part of a core that a coordinator uses whose sites have nothing to do."""
    coordinator = CoordinatorProcess(folder / "idle").up()
    made = Sites(folder, coordinator, sites)
    try:
        process = psutil.Process(coordinator.process.pid)
        time.sleep(5.0)
        before, started = process.cpu_times(), time.monotonic()
        time.sleep(seconds)
        after, passed = process.cpu_times(), time.monotonic() - started
        used = after.user + after.system - before.user - before.system
        return {
            "sites": sites,
            "seconds": passed,
            "percent_of_a_core": 100 * used / passed,
            "coordinator_mb": process.memory_info().rss / 1e6,
        }
    finally:
        made.close()
        coordinator.close()


def idle_site():
    """Memory of the site daemon's modules with PyTorch and everything else loaded, and no model."""
    code = (
        "import psutil, silotune.client.daemon, silotune.client.runtime, silotune.client.app\n"
        "import sys; assert 'torch' in sys.modules\n"
        "import gc; gc.collect(); print(psutil.Process().memory_info().rss)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    return {"mb": int(found.stdout.split()[-1]) / 1e6}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, shorter idling")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        one, two = Path(name) / "one", Path(name) / "two"
        one.mkdir()
        two.mkdir()
        found = {
            "exchange": exchange(one, sites=3, rounds=6 if options.quick else 20),
            "idle_coordinator": idle(two, sites=8, seconds=15 if options.quick else 60),
            "idle_site": idle_site(),
            "load_average": os.getloadavg()[0],
            "cores": os.cpu_count(),
        }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    latency, load, site = found["exchange"], found["idle_coordinator"], found["idle_site"]
    print(f"load average while measuring {found['load_average']:.1f} on {found['cores']} cores")
    print(
        f"exchange, {latency['sites']} sites, {latency['adapter_mb']:.1f} MB each way: "
        f"median {latency['seconds_median']:.2f} s "
        f"({latency['seconds_min']:.2f} to {latency['seconds_max']:.2f}), target < 1 s; "
        f"coordinator CPU {latency['coordinator_cpu_seconds_per_exchange']:.2f} s"
    )
    print(
        f"idle coordinator, {load['sites']} sites: {load['percent_of_a_core']:.1f} % of a core, "
        "target < 3 %"
    )
    print(
        f"memory: coordinator {latency['coordinator_mb_idle']:.0f} MB idle, "
        f"{latency['coordinator_mb_after']:.0f} MB after the run, target < 300 MB; "
        f"idle site {site['mb']:.0f} MB, target < 450 MB"
    )


if __name__ == "__main__":
    main()
