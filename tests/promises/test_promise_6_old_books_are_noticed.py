"""Promise 6: an older copy of a site's books is noticed by the site and by the coordinator.

A real coordinator and the real books of a site; each attack puts an old copy back as a careless
administrator would, or a cunning one.
"""

import copy
import json
import shutil

import pytest
from typer.testing import CliRunner

from silotune import cli
from silotune.client.daemon.api import closing_api
from silotune.client.daemon.books import SiteBooks, verify_books
from silotune.client.daemon.daemon import Daemon
from silotune.client.daemon.doctor import SiteDoctor
from silotune.client.daemon.enrolment import Enrolment, Joining
from silotune.data.site import SiteConfig
from silotune.errors import LedgerDamaged
from silotune.privacy.events import gaussian_event
from silotune.privacy.ledger import Budget, Ledger, ReleaseKey
from silotune.trust.audit import AUDIT_FILE, AuditLog
from silotune.trust.errors import AuditLogDamaged, BooksDisagree
from silotune.trust.vault import Vault
from tests.server.coordinator_material import Town, town  # noqa: F401 - a fixture

BUDGET = Budget(8.0, 1e-5)
SITE = """
name = "north"
[datasets.notes]
format = "csv"
path = "records.csv"
unit = "record"
declared_units = 300
[datasets.notes.columns]
text = "note"
label = "outcome"
[datasets.notes.budget]
epsilon = 8.0
delta = 1e-5
[policy]
"""
ROUND = gaussian_event(20.0)


class Books:
    """A site's state folder, opened as a daemon opens it; `reopen` after it was tampered with."""

    def __init__(self, folder, town):  # noqa: F811
        self.town = town
        (folder / "site.toml").write_text(SITE)
        self.config = folder / "site.toml"
        self.site = SiteConfig.load(self.config)
        self.state = self.site.state_folder
        coordinator = town.coordinator
        joining = Joining(self.site, coordinator.registrar.invite("north", url=coordinator.url))
        joining.ask()
        coordinator.registrar.approve(coordinator.registrar.requests()[0]["id"])
        joining.wait(seconds=10)
        self.books = None
        self.reopen()

    def reopen(self):
        if self.books is not None and self.books.ledger is not None:
            self.books.ledger.close()
        self.enrolment = Enrolment.open(self.site, Vault(self.state))
        self.audit = AuditLog(self.state / AUDIT_FILE, owner="north")
        self.books = SiteBooks(enrolment=self.enrolment, audit=self.audit)

    def ledger(self):
        return Ledger(self.state / "ledger.sqlite")

    def reserve(self, run, rounds=5):
        from dp_accounting import SelfComposedDpEvent

        ledger = self.ledger()
        ledger.reserve("notes", run, "ab" * 32, SelfComposedDpEvent(ROUND, rounds), budget=BUDGET)
        ledger.close()

    def train(self, run, number, *, block=None):
        """What is done for a message to train: agree, charge, write it down, exchange."""
        self.agree(run)
        ledger, key = self.ledger(), ReleaseKey(run, number, "update")
        ledger.charge("notes", key, "ab" * 32, ROUND, "cd" * 32, block=block)
        head = ledger.head
        ledger.close()
        place = {"ledger_seq": head.seq, "ledger_hash": head.hash}
        self.audit.append("answered", run=run, round=number, **place)
        self.exchange()

    def agree(self, run):
        with closing_api(self.enrolment.facts.url, self.enrolment.tls()) as api:
            self.books.agree(api, run, "notes")

    def exchange(self):
        with closing_api(self.enrolment.facts.url, self.enrolment.tls()) as api:
            self.books.exchange(api)

    def copy(self, to):
        shutil.copytree(self.state, to)
        return to

    def put_back(self, copy, *, only=""):
        """Files of an old copy in the place of those of now; with `only`, those of that name."""
        for path in self.state.glob(f"{only}*"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
        for path in copy.glob(f"{only}*"):
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, self.state / path.name)

    def verify(self):
        key = self.enrolment.federation_key
        return verify_books(self.state, AuditLog(self.state / AUDIT_FILE), trusted=key)

    def spent(self):
        ledger = self.ledger()
        found = ledger.spent("notes", 1e-5)
        ledger.close()
        return found

    def restore(self, *words):
        command = ["site", "restore", "--config", str(self.config), "--yes", "--json", *words]
        return CliRunner().invoke(cli.app, command)


@pytest.fixture
def north(tmp_path, town):  # noqa: F811
    """A site that has trained two rounds, a copy of its state folder, and two rounds after it."""
    (tmp_path / "north").mkdir()
    return trained(Books(tmp_path / "north", town), tmp_path / "old")


def trained(made, old):
    made.reserve("r1")
    for number in (1, 2):
        made.train("r1", number)
    made.old = made.copy(old)
    for number in (3, 4):
        made.train("r1", number)
    made.truly_spent = made.spent()
    return made


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The same, made once: for attacks that the site itself finds, on copies of its folder."""
    folder = tmp_path_factory.mktemp("once")
    made = Town(folder)
    try:
        (folder / "north").mkdir()
        books = trained(Books(folder / "north", made), folder / "old")
        books.audit.append("closed")
        yield books
    finally:
        made.close()


@pytest.fixture
def alone(once, tmp_path):
    """A copy of the site's folder, without a coordinator."""
    state = shutil.copytree(once.state, tmp_path / "north" / "state")
    found = copy.copy(once)
    found.state = state
    return found


def serves(north):
    return north.town.coordinator.books.serves("north")


def alarms(north, what):
    return [a["detail"] for a in north.town.coordinator.log.newest("alarm") if a["kind"] == what]


def test_a_site_that_only_goes_on_is_signed_for_and_served(once):
    assert serves(once)
    assert not alarms(once, "books_disagree")
    assert "whole, 6 rows" in once.verify()  # reservation, place of the audit log, charges


def test_the_ledger_restored_with_head_and_witness_is_refused_by_the_audit_log(alone):
    alone.put_back(alone.old, only="ledger.sqlite")
    with pytest.raises(LedgerDamaged, match="not the ledger that the audit log has seen"):
        alone.verify()


def test_a_new_audit_log_is_refused_by_the_ledger(alone):
    for path in alone.state.glob("audit.jsonl*"):
        path.unlink()
    AuditLog(alone.state / AUDIT_FILE, owner="north")
    with pytest.raises(AuditLogDamaged, match="not the audit log that the ledger has seen"):
        alone.verify()


def test_old_ledger_and_new_audit_log_together_are_refused(alone):
    alone.put_back(alone.old, only="ledger.sqlite")
    for path in alone.state.glob("audit.jsonl*"):
        path.unlink()
    AuditLog(alone.state / AUDIT_FILE, owner="north")
    with pytest.raises(AuditLogDamaged):
        alone.verify()


def test_a_deleted_ledger_is_missed(alone):
    for path in alone.state.glob("ledger.sqlite*"):
        path.unlink()
    with pytest.raises(LedgerDamaged, match="by the audit log it had 6 rows"):
        alone.verify()


def test_a_whole_older_state_folder_is_refused_by_the_coordinator_before_training(north):
    """The files agree with each other: only the coordinator knows better."""
    north.put_back(north.old)
    north.reopen()
    assert "whole, 4 rows" in north.verify()
    with pytest.raises(BooksDisagree, match="went back"):
        north.train("r1", 3)
    assert north.spent() < north.truly_spent  # nothing was charged, for nothing was trained
    # Both teams are told, and the site gets no message any more.
    assert [line.kind for line in north.audit.lines()].count("books_refused") == 1
    assert "ST-807" in alarms(north, "books_disagree")[0]
    assert north.town.audit("alarm")[-1]["what"] == "books_disagree"
    assert not serves(north)


@pytest.mark.slow
def test_deleted_ledger_and_audit_log_are_refused_by_the_coordinator(north):
    for name in ("ledger.sqlite", "audit.jsonl"):
        for path in north.state.glob(f"{name}*"):
            path.unlink()
    north.reopen()
    assert "no ledger yet" in north.verify()
    north.reserve("r2")
    with pytest.raises(BooksDisagree, match="went back"):
        north.train("r2", 1)
    assert not serves(north)


def test_a_fork_that_is_longer_than_what_was_signed_is_refused(north):
    """Old books, and enough of one's own making behind them to be ahead of the coordinator."""
    north.put_back(north.old)
    north.reopen()
    north.reserve("fork", rounds=50)
    ledger = north.ledger()
    for number in range(1, 30):
        key = ReleaseKey("fork", number, "update")
        ledger.charge("notes", key, "ab" * 32, ROUND, "ef" * 32)
    ledger.close()
    for number in range(40):
        north.audit.append("something", number=number)
    with pytest.raises(BooksDisagree, match="another entry"):
        north.agree("fork")
    assert not serves(north)


@pytest.mark.slow
def test_two_copies_of_a_site_are_one_too_many(north, tmp_path):
    second = north.copy(tmp_path / "second")
    north.train("r1", 5)
    north.put_back(second)
    north.reopen()
    with pytest.raises(BooksDisagree):
        north.agree("r1")


def test_a_coordinator_with_an_older_store_still_knows_what_it_signed(north, tmp_path):
    """Its own audit log remembers the heads."""
    coordinator, known = north.town.coordinator, north.town.coordinator.books.of("north").known
    from sqlalchemy import delete

    from silotune.server.store.database import SITE_BOOKS

    with coordinator.store.transaction() as connection:
        connection.execute(delete(SITE_BOOKS))
    north.town.restart()
    assert north.town.coordinator.books.of("north").known == known


@pytest.mark.slow
def test_a_halt_outlives_the_coordinators_process_and_ends_with_the_newest_copy(north, tmp_path):
    newest = north.copy(tmp_path / "newest")
    north.put_back(north.old)
    north.reopen()
    with pytest.raises(BooksDisagree):
        north.agree("r1")
    north.town.restart()
    assert not serves(north)
    north.put_back(newest)
    north.reopen()
    north.agree("r1")
    assert serves(north)


@pytest.mark.slow
def test_the_guard_lets_no_message_out_to_a_site_whose_books_went_back(north):
    from silotune.flower.site_link import Fleet
    from silotune.protocol.errors import CoordinatorRefused

    def connect():
        enrolment = north.enrolment
        fleet = Fleet(enrolment.facts.url, tls=enrolment.tls(), session="0" * 32)
        try:
            fleet.connect()
        finally:
            fleet.close()

    connect()
    north.put_back(north.old)
    north.reopen()
    with pytest.raises(BooksDisagree):
        north.agree("r1")
    with pytest.raises(CoordinatorRefused, match="ST-807"):
        connect()


@pytest.mark.slow
def test_a_site_that_finds_damage_at_start_tells_the_coordinators_team(north):
    for path in north.state.glob("ledger.sqlite*"):
        path.unlink()
    with pytest.raises(LedgerDamaged):
        Daemon(north.site)
    assert not serves(north)
    assert alarms(north, "books_disagree")


def test_restoring_charges_all_that_was_spent_or_reserved_and_is_audited(north):
    north.put_back(north.old)
    north.reopen()
    with pytest.raises(BooksDisagree):
        north.agree("r1")
    done = north.restore("--reason", "the disk died")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)["restored"][0]
    # Four rounds were charged and the fifth was reserved; the copy knows of two.
    five = Ledger(north.state / "five.sqlite")
    from dp_accounting import SelfComposedDpEvent

    five.reserve("notes", "all", "ab" * 32, SelfComposedDpEvent(ROUND, 5), budget=BUDGET)
    five.charge(
        "notes", ReleaseKey("all", 1, "x"), "ab" * 32, SelfComposedDpEvent(ROUND, 5), "cd" * 32
    )
    assert found["spent"] >= five.spent("notes", 1e-5) - 1e-9
    five.close()
    assert found["spent"] >= north.truly_spent
    north.reopen()
    assert "whole" in north.verify()
    assert [line.fields["reason"] for line in north.audit.lines() if line.kind == "books_restored"]
    assert north.town.audit("books_restored")[0]["reason"] == "the disk died"
    assert "the disk died" in alarms(north, "books_restored")[0]
    assert serves(north)
    north.reserve("r2", rounds=1)
    north.train("r2", 1)
    north.town.restart()
    assert serves(north)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["ledger.sqlite", "audit.jsonl", ""])
def test_restoring_from_nothing_charges_everything(north, lost):
    for path in north.state.glob("ledger.sqlite*" if lost != "audit.jsonl" else "audit.jsonl*"):
        path.unlink()
    if not lost:
        for path in north.state.glob("audit.jsonl*"):
            path.unlink()
    done = north.restore("--reason", "no backup")
    assert done.exit_code == 0, done.output
    north.reopen()
    assert north.spent() >= north.truly_spent
    assert "whole" in north.verify()
    north.reserve("r2", rounds=1)
    north.train("r2", 1)


def test_restored_books_pay_again_for_a_block_whose_later_rounds_they_forgot(tmp_path, town):  # noqa: F811
    """These cost nothing by themselves: what the coordinator remembers of costs misses none."""
    (tmp_path / "north").mkdir()
    north = Books(tmp_path / "north", town)
    north.reserve("r1", rounds=1)
    north.train("r1", 1, block=1)
    old = north.copy(tmp_path / "old")
    north.train("r1", 2, block=1)
    once = north.spent()
    north.put_back(old)
    assert north.restore("--reason", "the disk died").exit_code == 0
    north.reopen()
    assert north.spent() == once
    north.reserve("r1", rounds=1)
    north.train("r1", 2, block=1)
    assert north.spent() > 1.3 * once
    ledger = north.ledger()
    first, second = (ReleaseKey("r1", number, "update") for number in (1, 2))
    assert ledger.payload_of(first) and not ledger.payload_of(first, since_opened=True)
    assert ledger.payload_of(second, since_opened=True)
    ledger.close()


def test_restoring_twice_charges_once(north, monkeypatch):
    """As after a connection that broke before the coordinator had been told."""
    from silotune.client.daemon.api import CoordinatorApi
    from silotune.errors import RunError

    north.put_back(north.old)
    told = CoordinatorApi.restored

    def broken(self, restored):
        raise RunError("the line went down")

    monkeypatch.setattr(CoordinatorApi, "restored", broken)
    assert north.restore("--reason", "x").exit_code != 0
    once = north.spent()
    monkeypatch.setattr(CoordinatorApi, "restored", told)
    assert north.restore("--reason", "x").exit_code == 0
    assert north.spent() == once


def test_a_restoration_that_does_not_charge_is_refused(north):
    """A site whose software lies about it; the coordinator compares with what it signed."""
    from silotune.protocol import http

    known = north.town.coordinator.books.of("north").known
    lie = http.Restored.make(
        north.enrolment.keys.signing,
        federation="demo",
        site="north",
        replaces=known,
        log=http.LogHead(owner="north", seq=1, hash="ab" * 32),
        ledger=http.LedgerHead(seq=1, hash="ab" * 32),
        spent=(),
        reason="trust me",
        sent_at=0,
    )
    line = closing_api(north.enrolment.facts.url, north.enrolment.tls())
    with line as api, pytest.raises(BooksDisagree, match="is not charged"):
        api.restored(lie)
    assert north.town.coordinator.books.of("north").known == known


@pytest.mark.slow
def test_there_is_nothing_to_restore_in_the_newest_books(north):
    before = north.spent()
    done = north.restore("--reason", "to be sure")
    assert done.exit_code != 0
    assert "ST-650" in str(done.exception) or "ST-650" in done.output
    assert north.spent() == before


def test_the_doctor_says_only_what_it_checked(north):
    def told():
        return next(f for f in SiteDoctor(north.site).examine() if f.check == "ledger")

    good = told()
    assert good.state == "ok"
    assert "with the audit log up to row 6" in good.detail
    assert "is asked before each training" in good.detail
    north.put_back(north.old)  # nothing on this machine tells it from the newest
    assert "agrees with the head that the coordinator signed last" not in told().detail
    north.put_back(north.old, only="audit.jsonl")
    for path in north.state.glob("ledger.sqlite*"):
        path.unlink()
    assert (told().state, told().code) == ("failed", "ST-402")
