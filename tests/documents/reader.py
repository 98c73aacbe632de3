"""A reader who types every command of a document, in its order, in one folder.

What other people would do meanwhile (a site's team asks to be let in, an operator approves, a plan is
proposed) is done when a command needs it, whatever section it stands in.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

from silotune.models.pretrained import weights_sha256
from tests.documents.blocks import ROOT
from tests.e2e.harness import CLI, PRIVATE, as_toml, environment, free_port, wait_for
from tests.federation import write_federation, write_policy

# What has to be on the screen before somebody goes on to the next command.
READY = {
    r"coordinator start\b": "Listening at",
    r"site start\b": "online at",
    r"dashboard\b": "Open http",
    r"silotune serve\b": "Serving",
}
SECONDS = 240
SITE = "ward7"


class Reader:
    """One document in one folder.

    Parameters
    ----------
    folder : Path
        Where the commands are run.
    base : Path
        A tiny base model, in place of the demo's.
    """

    def __init__(self, folder, base):
        self.folder, self.base = folder, base
        folder.mkdir(parents=True)
        self.port, self.federation = free_port(), folder / "federation"
        self.site_folder = folder / "sites" / SITE
        self.running, self.shown, self.runs = {}, {}, []
        self.code = ""
        shim = folder / "bin" / "silotune"
        shim.parent.mkdir()
        shim.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{CLI[2]}' \"$@\"\n")
        shim.chmod(0o755)
        self.environment = environment(
            PATH=f"{shim.parent}:{os.environ['PATH']}",
            SILOTUNE_COORDINATOR=str(self.federation),
            HF_HUB_OFFLINE="1",
            OTEL_TRACES_EXPORTER="none",
        )
        self.cwd = folder

    # --- reading ---

    def read(self, blocks):
        """Run every command of every block that is to be run."""
        for block in blocks:
            if block.is_commands and block.reason is None:
                for command in block.commands:
                    for one in alternatives(command):
                        self.run(one, where=block.name)

    def run(self, command, *, where):
        """One command, after whatever it stands on; it must succeed."""
        self.cwd = self.folder
        for pattern, prepare in self.preparations():
            if re.search(pattern, command):
                prepare()
        typed = self.filled(command)
        for pattern, sign in READY.items():
            if re.search(pattern, command):
                self.start(typed, sign, where)
                return
        done = subprocess.run(
            ["bash", "-c", typed], cwd=self.cwd, env=self.environment, timeout=SECONDS, check=False,
            capture_output=True, text=True, input="a passphrase for the reader\n",
        )  # fmt: skip
        assert done.returncode == 0, f"{where}: {typed}\n{done.stdout}\n{done.stderr}"
        self.shown[command] = done.stdout

    def start(self, typed, sign, where):
        """A command that stays: wait until it says that it is ready."""
        key = re.search(r"(coordinator start|site start|dashboard|serve)", typed)[1]
        log = self.folder / f"{key.replace(' ', '-')}.log"
        if key in self.running:
            if typed.startswith("silotune"):
                return  # it is at work already
            self.end(key)
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec env {typed}"], cwd=self.cwd, env=self.environment,
                stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        self.running[key] = process

        def ready():
            assert process.poll() is None, f"{where}: {typed}\n{log.read_text()}"
            return sign in log.read_text()

        wait_for(ready, what=f"{where}: {typed}: {sign}")
        if key in {"dashboard", "serve"}:
            self.end(key)

    def end(self, key):
        process = self.running.pop(key)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=30)

    def close(self):
        for key in list(self.running):
            self.end(key)

    def filled(self, command):
        """A command as this reader types it: with real names in the place of those of the page."""
        for pattern, put in (
            (r"/var/lib/silotune/federation", str(self.federation)),
            (
                r"--host coord\.example\.org",
                f"--host 127.0.0.1 --listen 127.0.0.1 --port {self.port}",
            ),
            (r"\bCODE\b", self.code),
            (r"runs/RUN\b", "runs/" + self.simulated()),
            (r"\b(RUN|NAME)\b", self.runs[0] if self.runs else "RUN"),
            (r"[\w./-]+…", lambda match: self.newest(match[0])),
            (r"\beye-ent\b", self.any_site),
        ):
            command = re.sub(pattern, put if callable(put) else put.replace("\\", r"\\"), command)
        return command

    def newest(self, text):
        """``runs/name-…``: the newest folder that begins so."""
        found = sorted(self.cwd.glob(text.removesuffix("…") + "*"), key=lambda p: p.stat().st_mtime)
        return str(found[-1].relative_to(self.cwd))

    def any_site(self, match):
        del match
        return next(p.name for p in sorted(self.cwd.glob("hospitals/*")) if p.is_dir())

    def simulated(self):
        found = sorted(self.folder.glob("runs/*"))
        return found[0].name if found else "RUN"

    # --- what commands stand on ---

    def preparations(self):
        return [
            (r"simulate ", self.make_quick),
            (r"partition all\.csv", self.write_records),
            (r"examples/", self.have_examples),
            (r"coordinator (people|run|runs)\b", self.have_coordinator),
            (r"coordinator run plan\.toml", self.have_site),
            (r"coordinator runs (watch|show|adapter)", self.have_run),
            (r"coordinator runs (pause|stop)", self.have_long_run),
            (r"coordinator runs adapter", self.have_finished),
            (r"site join", self.be_invited),
            (r"site (start|resume|reseal)", self.enter_site),
            (r"site (dashboard|status|plans|doctor|pause)", self.be_site),
            (r"site plans", self.have_run),
            (r"audit .*coordinators-audit", self.have_both_logs),
            (r"(audit|ledger) \w+ state", self.be_site),
            (
                r"dashboard runs|export (curves |adapter )?runs/RUN|serve runs/RUN",
                self.have_simulation,
            ),
            (r"--credentials", self.have_finished),
        ]

    def silotune(self, *words):
        """A command of somebody else; its JSON."""
        done = subprocess.run(
            ["silotune", *map(str, words), "--json"], env=self.environment, cwd=self.folder,
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def make_quick(self):
        """The demo with a tiny model and three rounds."""
        plan = self.folder / "hospitals" / "plan.toml"
        text = re.sub(r'(?m)^base = ".*"', f'base = "{self.base}"', plan.read_text())
        text = re.sub(r"(?m)^number = \d+", "number = 3", text)
        text = re.sub(r"(?m)^(max_length|sha256|head_rounds|evaluate_every) = .*\n", "", text)
        plan.write_text(text.replace("[data]\n", "[data]\nmax_length = 24\n", 1))

    def write_records(self):
        rows = [f"note {i} of a patient,{'chronic' if i % 2 else 'acute'}" for i in range(200)]
        (self.folder / "all.csv").write_text("\n".join(["note,kind", *rows]) + "\n")

    def have_examples(self):
        if not (self.folder / "examples").exists():
            shutil.copytree(ROOT / "examples", self.folder / "examples")

    def have_coordinator(self):
        if not self.federation.exists():
            where = ["--host", "127.0.0.1", "--listen", "127.0.0.1", "--port", self.port]
            self.silotune("coordinator", "init", "--dir", self.federation, "--name", "f", *where)
            config = self.federation / "coordinator.toml"
            api = f'[admin]\nhost = "127.0.0.1"\nport = {free_port()}\n#'
            config.write_text(config.read_text().replace("[admin]", api, 1))
        self.start("silotune coordinator start", "Listening at", "the operator")

    def enter_site(self):
        self.cwd = self.site_folder

    def be_site(self):
        """Work in the site's folder, as its team."""
        self.have_site()
        self.cwd = self.site_folder

    def write_site(self, *, approval="auto"):
        if self.site_folder.exists():
            return
        sha = weights_sha256(self.base)
        plan = {"model__sha256": sha, "rounds__min_sites": 1, "rounds__number": 2, **PRIVATE}
        made = write_federation(self.folder / "sites", self.base, names=(SITE,), **plan)
        (self.folder / "plan.toml").write_text(as_toml(json.loads(made.plan.canonical())))
        clauses = {"approval": approval, "max_rounds": 400, "max_epsilon": 8.0}
        write_policy(self.site_folder / "site.toml", self.base, **clauses)

    def be_invited(self):
        self.have_coordinator()
        self.write_site()
        self.code = self.silotune("coordinator", "invite", SITE)["code"]
        self.cwd = self.site_folder
        if "operator" in self.running:
            self.end("operator")
        code = "for i in {1..60}; do sleep 1; silotune coordinator approve ward7 && break; done"
        self.running["operator"] = subprocess.Popen(
            ["bash", "-c", code], env=self.environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def have_site(self):
        """A site that was let in and is at work."""
        self.have_coordinator()
        self.write_site()
        here, self.cwd = self.cwd, self.site_folder
        if not (self.site_folder / "state" / "federation.json").exists():
            self.be_invited()
            self.run("silotune site join CODE", where="the site")
        self.start("silotune site start", "online at", "the site")
        self.cwd = here

    def have_run(self):
        self.have_site()
        known = self.silotune("coordinator", "runs", "list")
        if not known:
            self.silotune("coordinator", "run", self.folder / "plan.toml")
            known = self.silotune("coordinator", "runs", "list")
        self.runs = [row["run"] for row in known]

    def have_finished(self):
        """RUN is one that came to its end."""
        self.have_run()

        def finished():
            rows = self.silotune("coordinator", "runs", "list")
            return [row["run"] for row in rows if row["state"] == "finished"]

        self.runs = wait_for(finished, what="a finished run", every=1.0)

    def have_long_run(self):
        """RUN is one that is under way."""
        self.have_site()
        rows = self.silotune("coordinator", "runs", "list")
        going = [row["run"] for row in rows if row["state"] in {"running", "paused"}]
        if not going:
            plan = self.folder / "long.toml"
            text = (self.folder / "plan.toml").read_text()
            plan.write_text(
                re.sub(r"(?m)^number = \d+", "number = 300", text).replace("4.0", "1.0", 1)
            )
            going = [self.silotune("coordinator", "run", plan)["run"]]

            def under_way():
                return self.silotune("coordinator", "runs", "show", going[0])["state"] == "running"

            wait_for(under_way, what="the long run", every=0.5)
        self.runs = going

    def have_both_logs(self):
        self.be_site()
        self.have_finished()
        for name in ("audit.jsonl", "audit.jsonl.head"):
            target = self.site_folder / f"coordinators-{name}"
            shutil.copy(self.federation / "state" / name, target)
            target.chmod(0o600)

    def have_simulation(self):
        if not (self.folder / "runs").exists():
            self.write_site()
            sites = ("--sites", self.folder / "sites", "--workers", "1")
            self.silotune("simulate", self.folder / "plan.toml", *sites)


def alternatives(command):
    """``pause|resume|stop RUN`` as three commands."""
    match = re.search(r"\b\w+(?:\|\w+)+\b", command)
    if match is None:
        return [command]
    before, after = command[: match.start()], command[match.end() :]
    return [before + word + after for word in match[0].split("|")]


def played():
    """Documents that are read with the hands on the keyboard."""
    names = (
        "README.md",
        "docs/evaluation.md",
        "docs/statistics.md",
        "docs/operations.md",
        "docs/site.md",
        "docs/monitoring.md",
        "docs/formats.md",
        "docs/serving.md",
    )
    return [ROOT / name for name in names]
