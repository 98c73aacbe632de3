"""The doctor: each trouble is found, has its own code and a remedy, and hides nothing else."""

import csv
import shutil
import sqlite3
from collections import namedtuple
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from silotune.client.daemon import doctor, enrolment
from silotune.client.daemon.doctor import SiteDoctor
from silotune.client.daemon.enrolment import Joining
from silotune.data.site import SiteConfig
from silotune.errors import catalogue
from silotune.privacy.ledger import Ledger
from silotune.trust.authority import Authority
from tests.client.coordinator_double import CoordinatorDouble
from tests.client.site_material import write_site_folder

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def double(tmp_path):
    with CoordinatorDouble(tmp_path / "coordinator") as double:
        yield double


@pytest.fixture
def folder(tmp_path, bert_folder, double):
    folder = write_site_folder(tmp_path / "s", bert_folder).folder
    joining = Joining(SiteConfig.load(folder / "site.toml"), double.invitation())
    joining.ask()
    joining.wait(seconds=5)
    return folder


def examined(folder, edit=lambda text: text):
    path = folder / "site.toml"
    path.write_text(edit(path.read_text()))
    return {f.check: f for f in SiteDoctor(SiteConfig.load(path)).examine()}


def failures(found):
    return {check: f.code for check, f in found.items() if f.state == "failed"}


def test_a_healthy_site_has_no_findings(folder):
    found = examined(folder)
    assert failures(found) == {}
    assert {f.state for f in found.values()} == {"ok"}
    assert "60 records" in found["dataset notes"].detail


def test_records_that_are_left_out_are_told_with_their_labels(folder):
    notes = folder / "notes.csv"
    notes.write_text(notes.read_text() + "asthma of the left,perhaps,p\n,no,p\n")
    found = examined(folder, lambda text: text.replace("path =", 'labels = ["no", "yes"]\npath ='))
    assert failures(found) == {}
    said = found["dataset notes"].detail
    assert "column 'chronic': label is not declared in row 62: 'perhaps' (1)" in said
    assert "column 'note': empty text in row 63" in said


def repoint(text):
    return lambda folder: (folder / "state" / "federation.json").write_text(
        (folder / "state" / "federation.json").read_text().replace("127.0.0.1", text)
    )


def edit(folder, old, new):
    path = folder / "site.toml"
    text = path.read_text()
    if old is None:
        start = text.index("[policy.base_models]")
        digest = text[start:].split('"')[1]
        text = text.replace(digest, "ab" * 32)
    else:
        start = text.index(old)
        end = text.index("[resources]")
        text = text[:start] + text[end:]
    path.write_text(text)


def spoil_ledger(folder):
    Ledger(folder / "state" / "ledger.sqlite").close()
    (folder / "state" / "ledger.sqlite").unlink()
    (folder / "state" / "ledger.sqlite.head").write_text('{"seq": 3, "hash": "ab"}')
    (folder / "state" / "ledger.sqlite.head").chmod(0o600)


def cut(path):
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])


BROKEN = {
    "policy": ("ST-501", lambda f: edit(f, "[policy]", "[policy_]")),
    "name service": ("ST-740", repoint("no.such.host.invalid")),
    "dataset notes": ("ST-203", lambda f: (f / "notes.csv").unlink()),
    "base models": ("ST-302", lambda f: edit(f, None, None)),
    "keys": ("ST-430", lambda f: (f / "state" / "vault.key").unlink()),
    "ledger": ("ST-402", spoil_ledger),
    "audit log": ("ST-432", lambda f: cut(f / "state" / "audit.jsonl")),
}


@pytest.mark.parametrize("check", BROKEN)
def test_each_trouble_is_found_with_its_code(folder, check):
    code, break_it = BROKEN[check]
    break_it(folder)
    found = examined(folder)
    assert found[check].code == code, found
    known = {error.code: error for error in catalogue()}
    assert found[check].remedy
    assert code in known


def test_a_missing_column_is_found(folder):
    found = examined(folder, lambda text: text.replace('label = "chronic"', 'label = "missing"'))
    assert failures(found) == {"dataset notes": "ST-204"}


def test_a_protection_that_is_required_and_missing_is_found(folder):
    found = examined(folder)["isolation"]
    assert "is confined by no_new_privileges, " in found.detail
    assert (
        "memory_limit is not in force (resources.memory_mb of site.toml sets none)" in found.detail
    )
    two = examined(folder, lambda text: text.replace("[resources]", "[resources]\ndevices = 2", 1))
    assert "; 2 processes share a step" in two["device"].detail
    assert "landlock_network is not in force (its processes talk by TCP" in two["isolation"].detail
    asked = '[isolation]\nrequire = ["seccomp", "memory_limit"]\n[policy]'
    found = examined(folder, lambda text: text.replace("[policy]", asked, 1))["isolation"]
    assert (found.state, found.code) == ("failed", "ST-749")
    assert "memory_limit: resources.memory_mb of site.toml sets none" in found.detail
    assert "seccomp" not in found.detail


def test_an_open_key_file_is_found(folder):
    (folder / "state" / "vault.key").chmod(0o644)
    assert failures(examined(folder))["keys"] == "ST-409"


def test_a_closed_port_is_found(folder, double):
    double.server.shutdown()
    double.server.server_close()
    found = failures(examined(folder))
    assert found["port"] == "ST-741"
    assert found["tls"] == "ST-741"


def test_another_authority_is_found(folder, tmp_path):
    from silotune.trust.identity import chain_pem

    other = chain_pem([Authority.create("other").certificate])
    (folder / "state" / "authority.pem").write_text(other)
    found = failures(examined(folder))
    assert found["tls"] == "ST-743"
    assert found["certificate"] == "ST-744"


def test_a_wrong_clock_is_found(folder, double):
    early = format_datetime(datetime.now(UTC) - timedelta(minutes=10), usegmt=True)
    double.hook = lambda path, body: (200, double._answer(path, path, body), {"date": early})
    found = examined(folder)
    assert failures(found) == {"clock": "ST-745"}
    assert "+600 s" in found["clock"].detail or "+601 s" in found["clock"].detail


def test_a_full_disk_and_a_missing_gpu_are_found(folder, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(1, 1, 1000))
    found = examined(folder, lambda text: text.replace('device = "cpu"', 'device = "cuda:7"'))
    assert failures(found) == {"disk": "ST-746", "device": "ST-747"}


def test_a_dead_proxy_is_found(folder, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    found = examined(folder)
    assert failures(found)["proxy"] == "ST-742"
    assert (found["name service"].state, found["port"].state) == ("skipped", "skipped")


def test_a_site_outside_of_any_federation_is_told_so_once(folder):
    shutil.rmtree(folder / "state")
    found = examined(folder)
    assert failures(found) == {"enrolment": "ST-645"}
    assert found["tls"].state == "skipped"


def test_a_strangers_error_is_never_quoted(folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("patient Jane Doe")

    monkeypatch.setattr(enrolment.Enrolment, "open", fail)
    found = examined(folder)["enrolment"]
    assert (found.code, found.detail) == ("ST-000", "RuntimeError")


def in_database(url, query="SELECT * FROM notes"):
    def edit(text):
        source = f'format = "sql"\nurl = "{url}"\nquery = "{query}"'
        kept = [line for line in text.splitlines() if not line.startswith(("format =", "path ="))]
        return "\n".join(kept).replace("[datasets.notes]", f"[datasets.notes]\n{source}", 1) + "\n"

    return edit


def as_database(folder, name="notes.db"):
    """The notes in a database in WAL mode, open for another row."""
    with (folder / "notes.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    base = sqlite3.connect(folder / name)
    base.execute("PRAGMA journal_mode = WAL")
    base.execute(f"CREATE TABLE notes ({', '.join(header)})")
    base.executemany(f"INSERT INTO notes VALUES ({', '.join('?' * len(header))})", rows)
    base.commit()
    return base


def test_a_database_in_wal_mode_that_nobody_has_open_is_read(folder):
    as_database(folder).close()
    before = sorted(path.name for path in folder.iterdir())
    found = examined(folder, in_database("sqlite:///notes.db"))
    assert failures(found) == {}
    assert "60 records" in found["dataset notes"].detail
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_database_that_somebody_writes_to_is_read_with_the_newest_rows(folder):
    with closing(as_database(folder)) as base:
        base.execute("DELETE FROM notes WHERE rowid <= 10")
        base.commit()
        assert (folder / "notes.db-wal").stat().st_size > 0
        found = examined(folder, in_database("sqlite:///notes.db"))
    assert "50 records" in found["dataset notes"].detail


def test_changes_that_a_run_could_not_read_are_found_by_the_doctor(folder):
    """A program died and left changes beside the database: its folder is writable here, not there."""
    with closing(as_database(folder)):
        for end in ("", "-wal"):
            shutil.copy(folder / f"notes.db{end}", folder / f"left.db{end}")
    found = examined(folder, in_database("sqlite:///left.db"))["dataset notes"]
    assert (found.state, found.code) == ("failed", "ST-203")
    assert "left.db-wal holds changes" in found.detail
    assert "PRAGMA wal_checkpoint(TRUNCATE)" in found.remedy


def test_records_that_a_trainer_may_not_open_are_found(folder):
    """What a link of the folder leads to is readable for this account, not for a trainer."""
    (folder / "parts").mkdir()
    (folder / "notes.csv").rename(folder / "elsewhere.csv")
    (folder / "parts" / "a.csv").symlink_to(folder / "elsewhere.csv")
    found = examined(folder, lambda text: text.replace('"notes.csv"', '"parts"'))
    assert failures(found)["dataset notes"] == "ST-203"


def test_a_protection_that_a_database_over_the_network_costs_is_found(folder):
    edit = in_database("postgresql+psycopg://reader@127.0.0.1:9/clinic")
    found = examined(folder, edit)["isolation"]
    assert "network_namespace is not in force (the process reaches an address" in found.detail
    assert "(dataset notes)" in found.detail
    asked = '[isolation]\nrequire = ["network_namespace"]\n[policy]'
    found = examined(folder, lambda text: text.replace("[policy]", asked, 1))
    assert failures(found)["isolation"] == "ST-749"


def test_records_where_the_daemon_works_are_found(folder):
    assert "; the daemon can open no record" in examined(folder)["isolation"].detail
    shutil.copy(folder / "notes.csv", folder / "state" / "notes.csv")
    inside = examined(folder, lambda text: text.replace('"notes.csv"', '"state/notes.csv"'))
    why = "the daemon could read records: the records of notes lie where the daemon works"
    assert why in inside["isolation"].detail
    asked = '[isolation]\nrequire = ["landlock_files"]\n[policy]'
    found = examined(folder, lambda text: text.replace("[policy]", asked, 1))["isolation"]
    assert (found.code, why in found.detail) == ("ST-749", True)
