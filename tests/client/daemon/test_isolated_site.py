"""`[isolation]` of site.toml, at the command line: what stops a site, and what it says of itself."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from silotune.client.isolation.confinement import MEANINGS
from tests.client.coordinator_double import CoordinatorDouble
from tests.client.site_material import write_site_folder
from tests.client.site_process import SiteProcess


@pytest.fixture
def site(tmp_path, bert_folder):
    with CoordinatorDouble(tmp_path / "coordinator") as double:
        site = SiteProcess(write_site_folder(tmp_path / "s", bert_folder).folder)
        site.join(double.invitation())
        yield site
        site.stop()


def leaves_a_core(process):
    """Whether a process that is aborted, and may leave a core file, does."""
    resource.prlimit(process.pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
    process.send_signal(signal.SIGABRT)
    _, status = os.waitpid(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return os.WCOREDUMP(status)


def test_a_site_says_what_confines_its_records_and_its_own_memory_leaves_no_core(site, tmp_path):
    site.start().wait_online()
    rows = site.status()["isolation"]
    assert [row["name"] for row in rows] == list(MEANINGS)
    text = " ".join(site.site("status").stdout.split())
    held = sum(row["in_force"] for row in rows)
    assert f"Isolation {held} of {len(MEANINGS)} protections are in force" in text
    assert "memory_limit: resources.memory_mb of site.toml sets none" in text
    assert "memory_limit is not in force" in site.output()  # the warning in its log
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, cwd=tmp_path)
    assert leaves_a_core(other)
    assert not leaves_a_core(site.process)


def test_a_site_does_not_start_without_what_it_requires(site):
    text = site.config.read_text()
    asked = '[isolation]\nrequire = ["memory_limit"]\n[policy]'
    site.config.write_text(text.replace("[policy]", asked, 1))
    ended = site.site("start", check=False, timeout=60)
    assert ended.returncode == 70
    said = " ".join(ended.stderr.split())
    assert "ST-749" in said
    assert "memory_limit: resources.memory_mb of site.toml sets none" in said
    site.config.write_text(text.replace("[policy]", asked.replace("limit", "limits"), 1))
    assert "ST-201" in site.site("start", check=False).stderr


def test_threads_that_an_operator_asks_of_numpy_do_not_keep_the_daemon_from_shutting_itself_out(
    site,
):
    site.environment["OPENBLAS_NUM_THREADS"] = "4"
    status = site.start().wait_online()
    assert status["reads_records"] == ""
    assert "can not open a record" in site.site("status").stdout
