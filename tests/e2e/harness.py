"""A federation of real processes: one coordinator, three sites, TLS over loopback, the real CLI.

Nothing is left behind: every process that was started is ended, whatever a test does to it.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from safetensors.numpy import load_file

from silotune.errors import SilotuneError
from silotune.models.pretrained import weights_sha256
from silotune.server.admin.socket_client import AdminClient
from silotune.server.config import Home
from silotune.simulation.run import Settings, simulate
from tests import federation
from tests.federation import SITES, underscored, write_federation, write_policy

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-c", "from silotune.cli import main; main()"]
PRIVATE = underscored({**federation.PRIVATE, "privacy.epsilon": 4.0, "rounds.evaluate_every": 0})


def environment(**extra):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **extra}


def cli(*words, check=True, timeout=180, **extra):
    """A command of the real command line; its JSON, if it printed any, else its text."""
    found = subprocess.run(
        [*CLI, *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**extra),
    )
    assert not check or found.returncode == 0, f"{words}: {found.stdout}{found.stderr}"
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, *, seconds=240.0, what="it", every=0.05):
    """Until `condition()` is true; its value."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        value = condition()
        if value:
            return value
        time.sleep(every)
    raise AssertionError(f"{what} did not happen within {seconds} s")


class Daemon:
    """A process that is started, killed and started again; its log is one file."""

    def __init__(self, log, command):
        self._log, self._command = log, [*CLI, *map(str, command)]
        self.process = None

    def start(self, *, command=None, **extra):
        assert not self.running
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command or self._command, stdout=log, stderr=log, env=environment(**extra)
            )

    @property
    def running(self):
        return self.process is not None and self.process.poll() is None

    def kill(self):
        """As a power failure does it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)

    def terminate(self, *, seconds=60):
        """As a service manager does it; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=seconds)

    def close(self):
        if self.running:
            self.process.kill()
            self.process.wait(timeout=30)

    @property
    def output(self):
        return self._log.read_text() if self._log.exists() else ""


class CoordinatorProcess(Daemon):
    """The coordinator of a folder."""

    def __init__(self, folder, *, patience=120.0, port=None):
        self.folder, self.port = folder, port or free_port()
        super().__init__(
            folder.with_name("coordinator.log"), ["coordinator", "start", "--dir", folder]
        )
        hosts = ["--host", "127.0.0.1", "--host", "localhost"]
        words = ["--name", "demo", *hosts, "--listen", "127.0.0.1", "--port", self.port]
        self.created = json.loads(
            cli("coordinator", "init", "--dir", folder, *words, "--json").stdout
        )
        config = folder / "coordinator.toml"
        text = config.read_text().replace("# patience = 120.0", f"patience = {patience}  #")
        config.write_text(text)
        self.admin = AdminClient(Home(folder))

    def up(self, **extra):
        """Start, and wait until it answers."""
        self.start(**extra)
        wait_for(self._answers, what="the coordinator's start")
        return self

    def _answers(self):
        assert self.running, self.output
        try:
            return self.admin.get("/status")
        except SilotuneError:
            return None

    def cli(self, *words):
        """A `silotune coordinator` command with --json; what it printed."""
        found = cli("coordinator", *words, "--dir", self.folder, "--json")
        return json.loads(found.stdout)

    def invite(self, site, *, port=None):
        """A code; with another port, as if sites reached the coordinator through a proxy."""
        if port is None:
            return self.cli("invite", site)["code"]
        from dataclasses import replace

        from silotune.trust.invite import Invite

        code = Invite.decode(self.cli("invite", site)["code"])
        return replace(code, url=f"https://127.0.0.1:{port}").encode()

    def state(self, run):
        return self.admin.get(f"/runs/{run}")

    def events(self, run, kind=None):
        found = self.admin.get(f"/runs/{run}/events")["events"]
        return [event for event in found if kind in (None, event["event"])]

    def wait_round(self, run, number, *, kind="round_started"):
        """Until an event of a round is there."""
        return wait_for(
            lambda: next((e for e in self.events(run, kind) if e["round"] == number), None),
            what=f"{kind} {number}",
            every=0.01,
        )

    def wait_over(self, run, *, seconds=180.0):
        """Until a run is over; its row."""

        def over():
            assert self.running, self.output
            return self.over(run)

        return wait_for(over, seconds=seconds, what="the end of the run", every=0.2)

    def over(self, run):
        """The row of a run that is over; else None."""
        row = self.state(run)
        return row if row["state"] in {"finished", "failed", "stopped"} else None

    def wait_finished(self, run, *, seconds=180.0):
        """Until a run is over, and as it should be."""
        row = self.wait_over(run, seconds=seconds)
        assert row["state"] == "finished", row

    def dies(self, deaths, mark):
        """Whenever it is started from now on, die where it is told to: see `dying_coordinator`."""
        script, words = Path(__file__).with_name("dying_coordinator.py"), self._command[len(CLI) :]
        self._command = [sys.executable, str(script), json.dumps(deaths), str(mark), *words]

    def wait_finished_over_deaths(self, run, *, seconds, after_death=lambda: None):
        """Until a run is over, and as it should be, with starts after deaths; how many there were."""
        deaths = 0

        def over():
            nonlocal deaths
            if not self.running:
                deaths += 1
                after_death()
                self.start()
                return None
            try:
                return self.over(run)
            except Exception:
                return None  # it is starting, or dying

        row = wait_for(over, seconds=seconds, what="the end of the run", every=0.3)
        assert row["state"] == "finished", row
        return deaths

    def adapter(self, run, out):
        """Named arrays of a run's newest adapter, by the real command."""
        words = ["runs", "adapter", run, "--out", out, "--no-peft"]
        return load_file(self.cli(*words)["path"])

    def audit(self, kind=None):
        """The audit log, checked by the real command's own reader."""
        lines = (self.folder / "state" / "audit.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [line for line in found if kind in (None, line["kind"])]


class SiteProcess(Daemon):
    """The daemon of one site folder."""

    def __init__(self, folder):
        self.folder, self.config = folder, folder / "site.toml"
        words = ["site", "start", "--config", self.config, "--log-level", "debug"]
        super().__init__(folder / "daemon.log", words)

    def site(self, *words, check=True):
        """A `silotune site` command."""
        return cli("site", *words, "--config", self.config, check=check)

    def joining(self, code):
        """`silotune site join` in the background, waiting to be approved."""
        words = ["site", "join", code, "--config", self.config, "--wait", "120"]
        return subprocess.Popen(
            [*CLI, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )

    def ledger(self):
        """The rows of the site's ledger, as its own command exports them."""
        found = cli("ledger", "export", self.folder / "state")
        return [json.loads(line) for line in found.stdout.splitlines()]


class Federation:
    """A coordinator and enrolled sites on disk; `up` starts them all."""

    def __init__(
        self,
        folder,
        base,
        *,
        names=SITES,
        approval="auto",
        private=True,
        port=None,
        patience=120.0,
        **settings,
    ):
        self.folder = folder
        sha256 = weights_sha256(base)
        chosen = {"model__sha256": sha256, "rounds__min_sites": 3, **settings}
        if private:
            chosen = {**PRIVATE, **chosen}
        made = write_federation(folder / "sites", base, names=names, **chosen)
        self.plan = made.plan
        self.plan_path = folder / "sites" / "plan.toml"
        self.plan_path.write_text(as_toml(json.loads(made.plan.canonical())))
        for name in names:
            clauses = {"approval": approval, "max_rounds": 50, "require_privacy": private}
            write_policy(folder / "sites" / name / "site.toml", base, **clauses)
        self.coordinator = CoordinatorProcess(folder / "coordinator", patience=patience)
        self.sites = {name: SiteProcess(folder / "sites" / name) for name in names}
        self.proxied_port = port

    def up(self):
        """Start the coordinator, enrol every site through the command line, start them."""
        self.coordinator.up()
        self.enrol()
        for site in self.sites.values():
            site.start()
        self.wait_online()
        return self

    def enrol(self):
        """Invite, join, compare the six words, approve."""
        joins = {
            name: site.joining(self.coordinator.invite(name, port=self.proxied_port))
            for name, site in self.sites.items()
        }
        waiting = wait_for(self._all_ask, what="all requests")
        for row in waiting:
            self.coordinator.admin.post(f"/requests/{row['request']}/approve")
        for name, process in joins.items():
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
            words = next(row["words"] for row in waiting if row["site"] == name)
            assert words in output  # both people saw the same

    def _all_ask(self):
        rows = self.coordinator.admin.get("/requests")
        return rows if len(rows) == len(self.sites) else None

    def wait_online(self, *names):
        expected = set(names or self.sites)

        def online():
            for name in expected:
                assert self.sites[name].running, self.sites[name].output
            rows = self.coordinator.admin.get("/sites")
            return expected <= {row["site"] for row in rows if row["online"]}

        wait_for(online, what=f"{', '.join(sorted(expected))} online")

    def propose(self):
        """Propose the plan by the real command; the run's name."""
        return self.coordinator.cli("run", self.plan_path)["run"]

    def allow(self, *tasks):
        """Have the policy of every site take these tasks, and no other."""
        asked = 'tasks = ["text_classification"]'
        for site in self.sites.values():
            text = site.config.read_text()
            assert asked in text
            site.config.write_text(text.replace(asked, f"tasks = {json.dumps(tasks)}"))

    def as_simulated(self, run, out):
        """Whether a run's adapter is the simulation's, bit for bit. The sites end before that begins."""
        deployed = self.coordinator.adapter(run, out)
        for site in self.sites.values():
            site.terminate()
        return same(deployed, self.simulated().load_adapter(self.plan.rounds.number))

    def simulated(self):
        """The run directory of the same plan, as `silotune simulate` does it."""
        copy = self.folder / "simulated"
        shutil.copytree(
            self.folder / "sites", copy, ignore=shutil.ignore_patterns("state", "*.log")
        )
        settings = Settings(workers=1, device="cpu")
        return simulate(
            copy / "plan.toml", runs=copy / "runs", settings=settings, listener=lambda event: None
        )

    def charges(self, run):
        """How often each site charged each round of a run to its ledger."""
        found = {}
        for name, site in self.sites.items():
            rows = [r for r in site.ledger() if r["run"] == run and r["kind"] == "charge"]
            found[name] = sorted(row["round"] for row in rows)
        return found

    def close(self):
        """End everything, show the logs (pytest prints them if the test failed)."""
        daemons = [self.coordinator, *self.sites.values()]
        pids = [each.process.pid for each in daemons if each.process is not None]
        for each in daemons:
            each.close()
            print(f"--- {each._log.name} of {each._log.parent.name}\n{each.output[-6000:]}")
        assert not [pid for pid in pids if _alive(pid)]


def _alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def same(one, other):
    """Whether two adapters are equal bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() for name in one
    )


def as_toml(plan):
    """A plan's tables as TOML, leaving out what is not set."""
    lines = []

    def write(table, path):
        scalars = {k: v for k, v in table.items() if v is not None and not isinstance(v, dict)}
        if path:
            lines.append(f"[{'.'.join(path)}]")
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in scalars.items())
        for key, value in table.items():
            if isinstance(value, dict):
                write(value, [*path, key])

    write(plan, [])
    return "\n".join(lines) + "\n"
