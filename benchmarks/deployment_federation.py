"""A coordinator of one build with its doubles of sites, as processes; `deployment.py` measures them."""

import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from silotune.data.demo import write_hospitals
from silotune.plan.plan import Plan
from silotune.server.admin.socket_client import AdminClient
from silotune.server.config import Home
from tests.e2e.harness import (
    CLI,
    CoordinatorProcess,
    SiteProcess,
    cli,
    environment,
    free_port,
    wait_for,
)
from tests.federation import write_policy

SERVICE = {"MALLOC_ARENA_MAX": "2"}  # as deploy/silotune-coordinator.service has it
A_PROCESS = 25  # doubles
AFTER = 10.0  # seconds behind a run
NOOP = """
[plan]
name = "noop-{values}"
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
deadline = 600.0
[optimizer.site]
head_rounds = 0
[privacy]
mode = "none"
rate = 0.1
"""
SECURE = (
    NOOP
    + """
[aggregation]
secure = true
cohort = {sites}
update_bound = 1.0
"""
)
HOSPITAL = """
[plan]
name = "hospital"
purpose = "has a daemon take part in a run"
[model]
base = "{base}"
sha256 = "{sha256}"
task = "text_classification"
labels = ["acute", "chronic"]
[lora]
r = 2
alpha = 4.0
last_layers = 1
[data]
dataset = "diagnoses"
max_length = 48
[rounds]
number = 4
min_sites = 1
deadline = 1200.0
[optimizer.site]
head_rounds = 2
[privacy]
mode = "none"
rate = 0.12
"""
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
[policy]
"""


@dataclass(frozen=True)
class Build:
    """A commit, and where it is checked out."""

    name: str
    tree: Path

    @property
    def variables(self):
        """Of the environment of its processes: its package, not that of the current folder."""
        return {"PYTHONPATH": str(self.tree), "PYTHONSAFEPATH": "1", **SERVICE}

    @property
    def commit(self):
        words = ["git", "-C", str(self.tree), "rev-parse", "HEAD"]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


class BuiltCoordinator(CoordinatorProcess):
    """The coordinator of a build."""

    def __init__(self, build, folder):
        self._build, self.folder, self.port = build, folder, free_port()
        super(CoordinatorProcess, self).__init__(
            folder.with_name("coordinator.log"), ["coordinator", "start", "--dir", folder]
        )
        words = ["--name", "demo", "--host", "127.0.0.1", "--listen", "127.0.0.1"]
        words += ["--port", self.port]
        cli("coordinator", "init", "--dir", folder, *words, **build.variables)
        self.admin = AdminClient(Home(folder))

    def up(self):
        return super().up(**self._build.variables)


class Deployment:
    """A coordinator and sites of one build; left, they are ended."""

    def __init__(self, build, folder):
        self._build, self._folder, self._sites, self._processes = build, folder, 0, []
        folder.mkdir()
        self.coordinator = BuiltCoordinator(build, folder / "coordinator")

    def __enter__(self):
        self.coordinator.up()
        self._process = psutil.Process(self.coordinator.process.pid)
        return self

    def __exit__(self, *_):
        for process in self._processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        self.coordinator.close()

    def grow(self, total):
        """Enrol and start sites until there are so many, and wait until all are online."""
        while self._sites < total:
            self._add(min(A_PROCESS, total - self._sites))
        time.sleep(5.0)  # what the last one's coming made everybody ask

    def run(self, plan, *, values, rounds):
        """Seconds of each round of a run, and the coordinator's CPU seconds of one.

        What a run costs once, its approvals and the exchange in which sites join, is left out: CPU is
        counted from when a first round was seen to be over. What the sites cost while they have nothing
        to do (`idle`) is in it, for as long as the rounds took: `seconds_counted`.
        """
        path = self._folder / "plan.toml"
        path.write_text(plan.format(values=values, rounds=rounds, sites=self._sites))
        text = Plan.load(path).canonical()
        run, first = self.coordinator.admin.post("/runs", plan=text, quorum=None)["run"], None
        ends = time.monotonic() + 3600.0
        while (row := self._state(run))["state"] in {"proposed", "running"}:
            assert time.monotonic() < ends, row
            if first is None and row["round"]:
                first = row["round"], self._cpu, time.monotonic()
            time.sleep(0.1 if first is None else 0.5)
        cpu, ended = self._cpu, time.monotonic()
        assert row["state"] == "finished", row
        finished = self.coordinator.events(run, "round_finished")
        assert not any(event.get("void") for event in finished), finished
        seen, before, began = first or (rounds, cpu, ended)
        assert seen < rounds, "too few rounds to tell what one costs"
        return {
            "seconds": [event["seconds"] for event in finished],
            "cpu_seconds": (cpu - before) / (rounds - seen),
            "seconds_counted": (ended - began) / (rounds - seen),
        }

    def idle(self, seconds):
        """Part of a core that the coordinator uses whose sites have nothing to do."""
        time.sleep(5.0)
        before, started = self._cpu, time.monotonic()
        time.sleep(seconds)
        return 100 * (self._cpu - before) / (time.monotonic() - started)

    @property
    def megabytes(self):
        """Of the coordinator, now."""
        return self._process.memory_info().rss / 1e6

    @property
    def peak_megabytes(self):
        """Of the coordinator, ever."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6

    @property
    def _cpu(self):
        return cpu_of(self._process)

    def _add(self, count):
        """So many sites more, all in one process."""
        numbers = range(self._sites, self._sites + count)
        self._start([self._invited(f"site{number}") for number in numbers])
        asked = wait_for(lambda: self._asking(count), seconds=900, what="requests", every=0.5)
        for row in asked:
            self.coordinator.admin.post(f"/requests/{row['request']}/approve")
        self._sites += count
        wait_for(self._all_online, seconds=900, what="all sites online", every=1.0)

    def _invited(self, name):
        home = written_site(self._folder / name, name)
        return f"{home} {self.coordinator.admin.post('/invites', site=name)['code']}\n"

    def _start(self, lines):
        log = (self._folder / f"doubles-{len(self._processes)}.log").open("wb")
        script = Path(__file__).with_name("deployment_site.py")
        process = subprocess.Popen(
            [sys.executable, str(script)],
            env=environment(**self._build.variables),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        process.stdin.write("".join(lines).encode())
        process.stdin.close()
        self._processes.append(process)

    def _asking(self, count):
        rows = [r for r in self.coordinator.admin.get("/requests") if r["state"] == "waiting"]
        return rows if len(rows) == count else None

    def _all_online(self):
        return sum(r["online"] for r in self.coordinator.admin.get("/sites")) == self._sites

    def _state(self, run):
        assert self.coordinator.running, self.coordinator.output
        return self.coordinator.state(run)


def real_daemon(build, folder, *, base, seconds, restarts):
    """The daemon of a demo's hospital: memory and load when idle and after a run, and its way back."""
    folder.mkdir()
    coordinator = BuiltCoordinator(build, folder / "coordinator").up()
    write_hospitals(folder / "sites")
    site = SiteProcess(folder / "sites" / "eye-ent")
    sha256 = write_policy(site.config, base, approval="auto", require_privacy=False)
    path = folder / "plan.toml"
    path.write_text(HOSPITAL.format(base=base, sha256=sha256))
    try:
        code = coordinator.admin.post("/invites", site="eye-ent")["code"]
        words = ["site", "join", code, "--config", str(site.config), "--wait", "120"]
        joining = subprocess.Popen([*CLI, *words], env=environment(**build.variables))
        row = wait_for(lambda: coordinator.admin.get("/requests"), what="the request")[0]
        coordinator.admin.post(f"/requests/{row['request']}/approve")
        assert joining.wait(timeout=120) == 0
        site.start(**build.variables)
        process = psutil.Process(site.process.pid)
        wait_for(lambda: "online at" in site.output, seconds=180, what="the site online")
        time.sleep(20.0)  # whatever it loads when there is nothing to do
        before, started = cpu_of(process), time.monotonic()
        time.sleep(seconds)
        percent = 100 * (cpu_of(process) - before) / (time.monotonic() - started)
        idle = _memory(process, "idle")
        text = Plan.load(path).canonical()
        run = coordinator.admin.post("/runs", plan=text, quorum=None)["run"]
        row = coordinator.wait_over(run, seconds=1200)
        assert row["state"] == "finished", row
        time.sleep(AFTER)
        after = _memory(process, f"{AFTER:.0f}_s_after")
        back = [_restarted(site, build) for _ in range(restarts)]
    finally:
        site.close()
        coordinator.close()
    return {
        **idle,
        **after,
        "percent_of_a_core": percent,
        "restart_seconds_median": statistics.median(wall for wall, _ in back),
        "restart_cpu_seconds_median": statistics.median(cpu for _, cpu in back),
    }


def _memory(daemon, when):
    """Megabytes of a daemon, and of it with all that it has started: what is theirs alone."""
    family = [daemon, *daemon.children(recursive=True)]
    proportional = sum(each.memory_full_info().pss for each in family)
    return {
        f"{when}_mb": daemon.memory_info().rss / 1e6,
        f"{when}_all_mb": sum(each.memory_info().rss for each in family) / 1e6,
        f"{when}_all_pss_mb": proportional / 1e6,
        f"{when}_processes": len(family),
    }


def _restarted(site, build):
    """Wall and processor seconds from kill -9 to a site that asks for work again."""
    site.kill()
    seen, started = len(site.output), time.monotonic()
    site.start(**build.variables)
    wait_for(lambda: "online at" in site.output[seen:], what="the site back", every=0.01)
    return time.monotonic() - started, cpu_of(psutil.Process(site.process.pid))


def written_site(home, name):
    """A site's folder with its configuration."""
    home.mkdir()
    (home / "site.toml").write_text(SITE.format(name=name))
    (home / "site.toml").chmod(0o600)
    return home


def cpu_of(process):
    """Processor seconds that a process has used."""
    times = process.cpu_times()
    return times.user + times.system
