"""What a deployment costs without any training: latency, idle load, memory, time to come back.

One coordinator (the real command) and sites as processes of their own, over TLS on loopback. The sites
of the latency part answer with constants, so that all that is measured is the way there and back: a
2 MB adapter out and a 2 MB update in, sealed, signed, stored and acknowledged. The last part is the
real daemon of a site: idle, killed with SIGKILL and started again.

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

from tests.e2e.harness import CoordinatorProcess, SiteProcess, environment, wait_for  # noqa: E402

SERVICE = {"MALLOC_ARENA_MAX": "2"}  # as deploy/silotune-coordinator.service has it
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

    def __init__(self, folder, coordinator):
        self._folder, self._coordinator, self.processes = folder, coordinator, []

    def add(self, count):
        """Enrol and start so many more, and wait until all are online."""
        folder, coordinator, total = self._folder, self._coordinator, len(self.processes) + count
        for number in range(len(self.processes), total):
            name = f"site{number}"
            home = folder / name
            home.mkdir()
            (home / "site.toml").write_text(SITE.format(name=name))
            (home / "site.toml").chmod(0o600)
            code = coordinator.admin.post("/invites", site=name)["code"]
            words = [ROOT / "benchmarks" / "deployment_site.py", home, code]
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
            lambda: sum(r["online"] for r in coordinator.admin.get("/sites")) == total,
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


def exchange(folder, coordinator, *, sites, rounds):
    """Seconds of a round without training, and the coordinator's CPU and memory for it."""
    process = psutil.Process(coordinator.process.pid)
    plan = folder / "plan.toml"
    plan.write_text(PLAN.format(rounds=rounds, sites=sites))
    before = _cpu(process)
    idle = process.memory_info().rss
    run = coordinator.cli("run", plan)["run"]
    row = coordinator.wait_over(run, seconds=900)
    assert row["state"] == "finished", row
    cpu = (_cpu(process) - before) / (rounds + 1)
    finished = coordinator.events(run, "round_finished")
    seconds = [event["seconds"] for event in finished]
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


def idle(coordinator, *, sites, seconds):
    """Part of a core that a coordinator uses whose sites have nothing to do."""
    process = psutil.Process(coordinator.process.pid)
    time.sleep(5.0)
    before, started = _cpu(process), time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - started
    return {
        "sites": sites,
        "seconds": passed,
        "percent_of_a_core": 100 * (_cpu(process) - before) / passed,
    }


def daemon(folder, coordinator, *, seconds, restarts):
    """The real daemon of a site: memory and load while idle, and its way back after kill -9."""
    home = folder / "site"
    home.mkdir()
    (home / "site.toml").write_text(SITE.format(name="site") + "[policy]\n")
    (home / "site.toml").chmod(0o600)
    site = SiteProcess(home)
    try:
        joining = site.joining(coordinator.invite("site"))
        row = wait_for(lambda: _all(coordinator, 1), what="the request")[0]
        coordinator.admin.post(f"/requests/{row['request']}/approve")
        assert joining.wait(timeout=120) == 0
        site.start()
        process = psutil.Process(site.process.pid)
        wait_for(lambda: _ready(site), seconds=180, what="the site online, with PyTorch loaded")
        time.sleep(3.0)
        before, started = _cpu(process), time.monotonic()
        time.sleep(seconds)
        percent = 100 * (_cpu(process) - before) / (time.monotonic() - started)
        memory = process.memory_info().rss / 1e6
        back = [_restarted(site) for _ in range(restarts)]
    finally:
        site.close()
    return {
        "mb": memory,
        "percent_of_a_core": percent,
        "restart_seconds_median": statistics.median(wall for wall, _ in back),
        "restart_cpu_seconds_median": statistics.median(cpu for _, cpu in back),
    }


def _ready(site):
    assert site.running, site.output
    loaded = {m.path for m in psutil.Process(site.process.pid).memory_maps()}
    return "online at" in site.output and any("libtorch" in path for path in loaded)


def _restarted(site):
    """Wall and processor seconds from kill -9 to a site that asks for work again."""
    site.kill()
    seen, started = len(site.output), time.monotonic()
    site.start()
    wait_for(lambda: "online at" in site.output[seen:], what="the site back", every=0.01)
    return time.monotonic() - started, _cpu(psutil.Process(site.process.pid))


def _cpu(process):
    times = process.cpu_times()
    return times.user + times.system


def measured(*, quick):
    """All parts, on one coordinator: rounds of three sites, eight idle ones, a real daemon."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        coordinator = CoordinatorProcess(folder / "coordinator").up(**SERVICE)
        sites = Sites(folder, coordinator)
        try:
            sites.add(3)
            found = {"exchange": exchange(folder, coordinator, sites=3, rounds=4 if quick else 20)}
            sites.add(5)
            found["idle_coordinator"] = idle(coordinator, sites=8, seconds=6 if quick else 60)
            sites.close()
            seconds, restarts = (3, 1) if quick else (30, 5)
            found["site"] = daemon(folder, coordinator, seconds=seconds, restarts=restarts)
        finally:
            sites.close()
            coordinator.close()
    return {**found, "load_average": os.getloadavg()[0], "cores": os.cpu_count()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, shorter idling")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    options = parser.parse_args()
    found = measured(quick=options.quick)
    if options.json:
        print(json.dumps(found))
        return
    latency, load, site = found["exchange"], found["idle_coordinator"], found["site"]
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
    print(
        f"a site killed with SIGKILL is back after {site['restart_seconds_median']:.1f} s "
        f"({site['restart_cpu_seconds_median']:.1f} s of CPU), target < 5 s; "
        f"idle it uses {site['percent_of_a_core']:.1f} % of a core"
    )


if __name__ == "__main__":
    main()
