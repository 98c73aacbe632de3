"""A real trainer that runs out of memory, or of room on its disk: the site lives and says which."""

import re
import resource
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from silotune.client.site_run import SiteRun
from silotune.client.training.bounds import table_of
from silotune.client.training.launcher import Launcher
from silotune.client.training.process import TrainerProcesses
from silotune.client.troubles import latest_troubles
from silotune.data.site import SiteConfig
from silotune.models.layout import initial_adapter
from tests.federation import PRIVATE, write_federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = 20_000  # characters


class Scene:
    """A site with 60 notes in a database, its trainers, and a run."""

    def __init__(self, folder, bert_folder):
        settings = {key.replace(".", "__"): value for key, value in PRIVATE.items()}
        settings |= {"rounds__min_sites": 1, "rounds__number": 4, "privacy__rate": 0.5}
        made = write_federation(folder, bert_folder, names=("alpha",), **settings)
        self.folder, self.plan, self.model = folder / "alpha", made.plan, str(bert_folder)
        self.config = self.folder / "site.toml"
        self.launcher = self.part = None
        text = self.config.read_text()
        query = "SELECT * FROM notes ORDER BY note"
        source = f'format = "sql"\nurl = "sqlite:///notes.db"\nquery = "{query}"'
        text = re.sub(r"^(format|path) = .*\n", "", text, flags=re.MULTILINE)
        self.config.write_text(text.replace("[datasets.notes]", f"[datasets.notes]\n{source}", 1))
        with closing(sqlite3.connect(self.folder / "notes.db")) as base:
            base.execute("CREATE TABLE notes (note, chronic, patient)")
            rows = [("a cough" if n % 2 else "gout", "ny"[n % 2], f"p{n}") for n in range(60)]
            named = [(note, {"n": "no", "y": "yes"}[label], unit) for note, label, unit in rows]
            base.executemany("INSERT INTO notes VALUES (?, ?, ?)", named)
            base.commit()

    def start(self, **resources):
        """A daemon's part in the run, anew, as after a restart."""
        self.stop()
        lines = [f"{key} = {value}" for key, value in {"threads": 1, **resources}.items()]
        text = re.sub(r"\n\[resources\]\n[^\[]*", "\n", self.config.read_text())
        self.config.write_text(f'{text}\n[resources]\ndevice = "cpu"\n' + "\n".join(lines) + "\n")
        site = SiteConfig.load(self.config)
        self.scratch = self.folder / "scratch"
        self.launcher = Launcher(table_of(site, scratch=self.scratch, models=[self.model]))
        self.processes = TrainerProcesses(site, launcher=self.launcher)
        self.part = SiteRun(
            site, state=self.folder / "state", plan=self.plan, run="r", models=self.processes
        )
        self.part.join()
        return self

    def train(self, number):
        start = initial_adapter(self.part.layout, self.plan)
        return self.part.train(start, number).array_records["update"]["flat"].numpy()

    def add_long_notes(self, count):
        """And end the trainer, as after a time without questions: the next one reads them."""
        self.processes.close()
        with closing(sqlite3.connect(self.folder / "notes.db")) as base:
            text = "a cough " * (LONG // 8)
            rows = [(f"{n:05d} {text}", "no", f"long {n}") for n in range(count)]
            base.executemany("INSERT INTO notes VALUES (?, ?, ?)", rows)
            base.commit()

    def remove_long_notes(self):
        self.processes.close()
        with closing(sqlite3.connect(self.folder / "notes.db")) as base:
            base.execute("DELETE FROM notes WHERE patient LIKE 'long %'")
            base.commit()

    def codes(self):
        return [(each["round"], each["error"]) for each in latest_troubles(self.folder / "state")]

    def stop(self):
        if self.launcher is not None:
            self.processes.close()
            self.launcher.close()


@pytest.fixture
def scene(tmp_path, bert_folder):
    made = Scene(tmp_path, bert_folder)
    yield made
    made.stop()


def private_memory(pid):
    """What RLIMIT_DATA counts of a process, in MB."""
    found = re.search(r"VmData:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) // 1000


def test_a_trainer_that_hits_its_limit_of_memory_is_told_and_the_next_round_works(scene):
    scene.start().train(1)
    needed = private_memory(scene.processes.describe()["pid"])
    scene.start(memory_mb=max(needed + 60, 512))
    scene.add_long_notes(10_000)  # 200 MB of text
    sent = scene.train(2)
    assert np.isfinite(sent).all() and sent.any()  # noise alone
    assert scene.codes() == [(2, "ST-753")]
    scene.remove_long_notes()
    scene.train(3)
    assert scene.codes() == [(2, "ST-753")]
    rows = scene.processes.describe()["protections"]
    assert {"name": "memory_limit", "in_force": True, "reason": ""} in rows


def test_a_full_scratch_folder_is_told_and_the_next_round_works(scene):
    """SQLite sorts what is long by way of the disk; no file may grow past 64 KB here."""
    scene.start()
    scene.add_long_notes(300)
    limits = resource.prlimit(scene.launcher.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(scene.launcher.pid, resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    sent = scene.train(1)
    assert np.isfinite(sent).all() and sent.any()
    assert scene.codes() == [(1, "ST-754")]
    resource.prlimit(scene.launcher.pid, resource.RLIMIT_FSIZE, limits)
    scene.train(2)  # the disk has room: the same records are sorted there now
    assert scene.codes() == [(1, "ST-754")]
    scene.processes.close()
    assert not list(scene.scratch.iterdir())
