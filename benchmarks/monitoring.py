"""What watching costs: the store's part of a round, watchers of the stream, a large run in a browser.

    python benchmarks/monitoring.py [store] [watchers] [page] [--quick] [--json]

*store* writes rounds of 3 and of 50 sites as a run does. *watchers* runs a federation of real processes
whose sites answer with constants after a pause, and compares rounds without and with fifty watchers of
the gRPC stream in a process of their own. *page* opens a simulation of 50 sites and 200 rounds in
Debian's chromium, and then tells one round more.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from deployment import PLAN, Sites  # noqa: E402 - of this folder

from tests.e2e.harness import CLI, CoordinatorProcess, cli, environment, free_port, wait_for  # noqa: E402

# At the lowest priority: in life watchers are on other machines.
WATCH = """
import os, sys, threading, time
os.nice(19)
from pathlib import Path
from silotune.server.admin.client import ControlClient
folder, run, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = [0] * count
def watch(index):
    client = ControlClient(folder)
    for event in client.watch(run, after=int(sys.argv[4])):
        seen[index] += 1
threads = [threading.Thread(target=watch, args=(i,), daemon=True) for i in range(count)]
for thread in threads: thread.start()
while not all(seen): time.sleep(0.1)
print("watching", flush=True)
sys.stdin.readline()
print(*seen, flush=True)
"""


def store(*, sites, rounds):
    """CPU and wall seconds of what a round writes, on SQLite, with the disk waited for."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from silotune.server.store.database import Store
    from silotune.server.store.runs import Runs, RunWriter
    from silotune.trust.signed import SignedPlan
    from silotune.trust.vault import Vault
    from tests.server.monitored import plan_of, tell_round

    folder = Path(tempfile.mkdtemp(dir=ROOT))
    made = Store(f"sqlite:///{folder / 's.sqlite'}", vault=Vault(folder / "keys"))
    try:
        plan = plan_of(rounds=rounds + 5)
        signed = SignedPlan.sign(plan, Ed25519PrivateKey.generate())
        Runs(made).propose(plan, signed, run="r", quorum=2)
        record = RunWriter(
            made, "r", on_event=lambda: None, on_checkpoint=lambda number: None, gathers=True
        )
        names = [f"site-{number}" for number in range(sites)]
        wall, cpu, durable, whole = [], [], [0.0], record.save_checkpoint

        def timed(*arguments):
            started = time.perf_counter()
            whole(*arguments)
            durable[0] = time.perf_counter() - started

        record.save_checkpoint, events = timed, []
        for number in range(1, rounds + 6):
            started, used = time.perf_counter(), time.process_time()
            tell_round(record, number, names, size=20_000)
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
            events.append(wall[-1] - durable[0])
        record.close()
    finally:
        made.close()
        shutil.rmtree(folder)
    return {
        "sites": sites,
        "cpu_ms": 1000 * statistics.median(cpu[5:]),
        "wall_ms": 1000 * statistics.median(wall[5:]),
        "events_wall_ms": 1000 * statistics.median(events[5:]),
    }


def watchers(folder, *, count, rounds, pause):
    """Seconds of a round and the coordinator's CPU for it, without and with watchers, in turns."""
    coordinator = CoordinatorProcess(folder / "coordinator")
    config = coordinator.folder / "coordinator.toml"
    config.write_text(config.read_text().replace("# port = 8444", f"port = {free_port()}"))
    coordinator.up()
    os.environ["SILOTUNE_BENCHMARK_PAUSE"] = str(pause)
    made = Sites(folder, coordinator)
    try:
        made.add(3)
        cli("coordinator", "people", "add", "vera", "--role", "viewer", "--out", folder / "vera",
            "--dir", coordinator.folder)  # fmt: skip
        process, (plan, turns) = psutil.Process(coordinator.process.pid), (folder / "plan.toml", 6)
        plan.write_text(PLAN.format(rounds=rounds * turns + 10, sites=3))
        run = coordinator.cli("run", plan)["run"]
        _until(coordinator, run, 3)
        found = {False: [], True: []}
        cpu = {False: 0.0, True: 0.0}
        for turn in range(turns):
            watched = bool(turn % 2)
            crowd = _crowd(folder / "vera", run, count, coordinator) if watched else None
            first = _rounds(coordinator, run)[-1]["round"] + 1
            _until(coordinator, run, first)
            before = process.cpu_times()
            _until(coordinator, run, first + rounds - 2)
            after = process.cpu_times()
            cpu[watched] += after.user + after.system - before.user - before.system
            rows = _rounds(coordinator, run)
            found[watched] += [
                r["seconds"] for r in rows if first < r["round"] <= first + rounds - 2
            ]
            if crowd is not None:
                seen = crowd.communicate("\n", timeout=60)[0].split()
                assert len(set(seen)) <= 2, seen  # they are level, but for a batch under way
        alone, crowded = (statistics.median(found[key]) for key in (False, True))
        return {
            "watchers": count,
            "round_seconds_alone": alone,
            "round_seconds_watched": crowded,
            "slower_percent": 100 * (crowded / alone - 1),
            "cpu_ms_a_round_alone": 1000 * cpu[False] / len(found[False]),
            "cpu_ms_a_round_watched": 1000 * cpu[True] / len(found[True]),
        }
    finally:
        made.close()
        coordinator.close()


def _rounds(coordinator, run):
    return coordinator.events(run, "round_finished")


def _until(coordinator, run, number):
    """Wait for a round without asking so often that it shows in the figures."""
    wait_for(lambda: coordinator.state(run)["round"] >= number, every=0.5, what=f"round {number}")
    time.sleep(0.5)  # its figures are written a moment later


def _crowd(credentials, run, count, coordinator):
    last = coordinator.events(run)[-1]["id"]
    process = subprocess.Popen(
        [sys.executable, "-c", WATCH, str(credentials), run, str(count), str(last)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    process.stdout.readline()
    return process


def page(folder):
    """Seconds until a large run is drawn, and until a further round is seen."""
    from playwright.sync_api import sync_playwright

    from silotune.rounds.run_directory import RunDirectory
    from tests.simulation.synthetic_run import Synthetic

    sites = {f"site-{number:02d}": 500 for number in range(50)}
    root = Synthetic(sites=sites, rounds=201, stop_after=200, faults=False).write(folder)
    shown = subprocess.Popen(
        [*CLI, "dashboard", str(root)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        link = shown.stdout.readline().split()[-1]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=["--no-sandbox"]
            )
            seen = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
            seen.goto(link)
            address = f"{link.split('/signin')[0]}/runs/{root.name}"
            opened = [_opening(seen, address) for _ in range(4)]
            run = RunDirectory.open(root)
            started = time.perf_counter()
            run.append_event("round_finished", round=201, seconds=1.0)
            seen.wait_for_selector("text=201 of 201")
            live = time.perf_counter() - started
            browser.close()
    finally:
        shown.terminate()
        shown.wait()
    return {"first_seconds": opened[0], "again_seconds": min(opened[1:]), "live_seconds": live}


def _opening(seen, address):
    started = time.perf_counter()
    seen.goto(address, wait_until="load")
    seen.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    assert seen.locator("svg.lane").count() == 50
    return time.perf_counter() - started


def measured(parts, *, quick):
    """Results by part."""
    found = {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        if "store" in parts:
            rounds = 20 if quick else 60
            found["store"] = [store(sites=count, rounds=rounds) for count in (3, 50)]
        if "watchers" in parts:
            found["watchers"] = watchers(Path(name), count=50, rounds=8 if quick else 20, pause=0.5)
        if "page" in parts:
            found["page"] = page(Path(name))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=["store", "watchers", "page"])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", action="store_true", help="last line is one JSON object")
    options = parser.parse_args()
    found = measured(options.parts, quick=options.quick)
    if options.json:
        print(json.dumps(found))
        return
    print(f"load average before measuring {found['load_average']:.1f} on {found['cores']} cores")
    for row in found.get("store", []):
        print(
            f"store, {row['sites']} sites: {row['cpu_ms']:.1f} ms of CPU, {row['wall_ms']:.1f} ms "
            f"a round, of which {row['events_wall_ms']:.1f} ms for events and the rest for the "
            "checkpoint on the disk, target < 10 ms"
        )
    if row := found.get("watchers"):
        print(
            f"{row['watchers']} watchers: a round of {row['round_seconds_alone']:.3f} s takes "
            f"{row['round_seconds_watched']:.3f} s ({row['slower_percent']:+.1f} %, target <= 2 %); "
            f"coordinator CPU {row['cpu_ms_a_round_alone']:.0f} to "
            f"{row['cpu_ms_a_round_watched']:.0f} ms a round"
        )
    if row := found.get("page"):
        print(
            f"50 sites, 200 rounds in chromium: {row['first_seconds']:.2f} s at first, "
            f"{row['again_seconds']:.2f} s again (target < 1.5 s); a further round is seen after "
            f"{row['live_seconds']:.2f} s"
        )


if __name__ == "__main__":
    main()
