"""Claims about damage: whatever is done to the files, the ledger is whole or refuses."""

import contextlib
import json
import os
import random
import shutil
import sqlite3
import stat
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from silotune.errors import FileExposed, LedgerDamaged
from silotune.privacy.ledger_table import LedgerEntry, LedgerTable, Row
from silotune.trust.chain import GENESIS, Head

COORDINATOR = Ed25519PrivateKey.from_private_bytes(bytes(32))


def entry(number):
    return LedgerEntry(
        kind="charge", dataset="notes", run="r", time="now", round=number, release="update"
    )


def open_chain(path, **options):
    seen = []
    chain = LedgerTable(path, observe=seen.append, **options)
    return chain, seen


def append(chain, number):
    with chain.transaction() as add:
        add(entry(number))


@pytest.fixture
def path(tmp_path):
    """A closed chain of five rows."""
    path = tmp_path / "state" / "ledger.sqlite"
    chain, _ = open_chain(path)
    for number in range(1, 6):
        append(chain, number)
    chain.close()
    return path


def head_file(path):
    return path.with_name(path.name + ".head")


def tamper(path, *statements):
    """Change the file as an intruder with a good tool would: guards off, guards on again."""
    db = sqlite3.connect(path)
    guards = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in guards:
        db.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        db.execute(statement)
    for _, sql in guards:
        with contextlib.suppress(sqlite3.OperationalError):  # a dropped table needs no guard
            db.execute(sql)
    db.commit()
    db.close()


def refused(path):
    with pytest.raises(LedgerDamaged) as caught:
        open_chain(path)
    return str(caught.value)


# --- whole chains -------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(path):
    chain, seen = open_chain(path)
    assert [row.entry for row in seen] == [entry(n) for n in range(1, 6)]
    assert chain.rows() == seen
    assert chain.head == chain.verify() == seen[-1].head
    assert seen[0].previous == GENESIS.hash


def test_every_row_is_observed_once_whoever_wrote_it(path):
    (one, seen_by_one), (other, seen_by_other) = open_chain(path), open_chain(path)
    append(one, 6)
    append(other, 7)
    append(one, 8)
    assert one.head == other.head
    assert seen_by_one == seen_by_other == one.rows()


def test_the_head_file_names_the_newest_row_as_soon_as_it_is_appended(path):
    chain, _ = open_chain(path)
    append(chain, 6)
    written = json.loads(head_file(path).read_text())
    assert written == {"seq": 6, "hash": chain.rows()[-1].hash}


def test_a_block_that_fails_appends_nothing(path):
    chain, seen = open_chain(path)
    before = chain.head
    with pytest.raises(RuntimeError), chain.transaction() as add:
        add(entry(6))
        raise RuntimeError
    assert chain.head == before
    append(chain, 6)
    assert chain.verify().seq == len(seen) == 6


texts = st.text(max_size=8)
maybe = st.none() | texts
entries = st.builds(
    LedgerEntry,
    kind=texts,
    dataset=texts,
    run=texts,
    time=texts,
    round=st.none() | st.integers(0, 2**40),
    release=maybe,
    plan_sha256=maybe,
    event=maybe,
    budget=maybe,
    payload_sha256=maybe,
)
heads = st.builds(Head, st.integers(0, 2**40), texts)


@given(heads, entries, heads, entries)
def test_different_rows_have_different_hashes(place, said, other_place, other_said):
    one, other = Row.after(place, said), Row.after(other_place, other_said)
    assert (one.hash == other.hash) == ((place, said) == (other_place, other_said))


# --- crashes ------------------------------------------------------------------------------------


def test_a_crash_between_row_and_head_is_repaired(path):
    head = head_file(path).read_bytes()
    chain, _ = open_chain(path)
    append(chain, 6)
    chain.close()
    newest = head_file(path).read_bytes()
    head_file(path).write_bytes(head)
    chain, seen = open_chain(path)
    assert len(seen) == 6
    assert head_file(path).read_bytes() == newest


def test_a_crash_at_the_very_beginning_is_repaired(tmp_path):
    path = tmp_path / "ledger.sqlite"
    open_chain(path)[0].close()
    path.unlink()
    append(open_chain(path)[0], 1)
    path = tmp_path / "second.sqlite"
    open_chain(path)[0].close()
    path.write_bytes(b"")
    append(open_chain(path)[0], 1)


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET event = 'cheaper' WHERE seq = 3",
        "UPDATE entries SET dataset = 'other' WHERE seq = 1",
        "UPDATE entries SET round = 99 WHERE seq = 5",
        "UPDATE entries SET round = NULL WHERE seq = 5",
        "UPDATE entries SET hash = printf('%064d', 0) WHERE seq = 2",
        "DELETE FROM entries WHERE seq = 2",
        "DELETE FROM entries WHERE seq = 5",
        "DELETE FROM entries WHERE seq >= 2",
        "DELETE FROM entries",
        "DROP TABLE entries",
        "ALTER TABLE entries DROP COLUMN budget",
    ],
)
def test_an_edited_table_is_refused(path, statement):
    tamper(path, statement)
    refused(path)


def test_rows_rewritten_with_a_valid_chain_are_refused(path):
    """The intruder recomputes every hash after the edited row, but not the head file."""
    rows = open_chain(path)[0].rows()
    forged, last = [], GENESIS
    for row in rows:
        said = replace(row.entry, dataset="other") if row.seq == 2 else row.entry
        forged.append(Row.after(last, said))
        last = forged[-1].head
    tamper(
        path,
        *(
            f"UPDATE entries SET dataset = '{r.entry.dataset}', previous = '{r.previous}', "
            f"hash = '{r.hash}' WHERE seq = {r.seq}"
            for r in forged
        ),
    )
    assert "head file" in refused(path)


def test_removed_guards_are_refused(path):
    db = sqlite3.connect(path)
    db.execute("DROP TRIGGER no_delete")
    db.commit()
    db.close()
    assert "guards" in refused(path)


def test_the_table_itself_forbids_changes(path):
    db = sqlite3.connect(path)
    columns = db.execute("SELECT * FROM entries WHERE seq = 5").fetchone()
    marks = ", ".join("?" * len(columns))
    for statement, values in (
        ("UPDATE entries SET event = 'x'", ()),
        ("DELETE FROM entries WHERE seq = 5", ()),
        (f"INSERT OR REPLACE INTO entries VALUES ({marks})", columns),
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement, values)
    db.close()


def test_an_older_table_beside_a_newer_head_is_refused(path):
    old = path.read_bytes()
    chain, _ = open_chain(path)
    append(chain, 6)
    chain.close()
    path.write_bytes(old)
    assert "row 5" in refused(path)


def test_an_older_head_beside_a_newer_table_is_refused(path):
    old = head_file(path).read_bytes()
    chain, _ = open_chain(path)
    append(chain, 6)
    append(chain, 7)
    chain.close()
    head_file(path).write_bytes(old)
    assert "row 5" in refused(path)


@pytest.mark.parametrize("content", [b"", b"5", b"{}", b'{"seq": 5}', b'{"seq": 5, "hash": "x"}'])
def test_a_head_that_is_no_head_is_refused(path, content):
    head_file(path).write_bytes(content)
    refused(path)


@pytest.mark.parametrize("suffix", ["", ".head"])
def test_a_missing_file_is_refused(path, suffix):
    path.with_name(path.name + suffix).unlink()
    assert "missing" in refused(path)


def test_a_ledger_that_must_be_there_is_not_started(tmp_path):
    with pytest.raises(LedgerDamaged, match="no ledger"):
        open_chain(tmp_path / "ledger.sqlite", create=False)
    assert not list(tmp_path.iterdir())


def test_flipped_bytes_change_nothing_or_are_refused(path):
    """Each of 150 random bytes of the file, one at a time."""
    whole, rows = path.read_bytes(), open_chain(path)[0].rows()
    chance = random.Random(7)
    refusals = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            chain, _ = open_chain(path)
        except LedgerDamaged:
            refusals += 1
            continue
        assert chain.rows() == rows
        chain.close()
    assert refusals > 0


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(path, kept):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refused(path)


def test_a_file_replaced_during_use_is_noticed(path, tmp_path):
    copy = tmp_path / "copy"
    shutil.copy(path, copy)
    chain, _ = open_chain(path)
    append(chain, 6)
    copy.replace(path)
    with pytest.raises(LedgerDamaged, match="replaced"):
        append(chain, 7)


def test_rows_removed_during_use_are_noticed(path):
    chain, _ = open_chain(path)
    tamper(path, "DELETE FROM entries WHERE seq >= 4")
    with pytest.raises(LedgerDamaged, match="truncated"):
        append(chain, 6)


# --- permissions --------------------------------------------------------------------------------


def test_files_are_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        chain, _ = open_chain(tmp_path / "state" / "ledger.sqlite")
        append(chain, 1)
        chain.witness(chain.head, chain.head.sign(COORDINATOR), COORDINATOR.public_key())
    finally:
        os.umask(before)
    files = list((tmp_path / "state").iterdir())
    assert len(files) >= 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize("suffix", ["", ".head"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_files_open_to_others_are_refused(path, suffix, mode):
    path.with_name(path.name + suffix).chmod(mode)
    with pytest.raises(FileExposed, match="0600"):
        open_chain(path)


# --- the counter-signed head --------------------------------------------------------------------


def test_both_files_restored_from_one_backup_are_caught_by_the_counter_signed_head(path):
    backup = path.read_bytes(), head_file(path).read_bytes()
    chain, _ = open_chain(path)
    append(chain, 6)
    head = chain.head
    chain.witness(head, head.sign(COORDINATOR), COORDINATOR.public_key())
    chain.close()
    path.write_bytes(backup[0])
    head_file(path).write_bytes(backup[1])
    assert "counter-signed" in refused(path)


def test_a_restored_site_is_told_by_the_other_side(path):
    chain, _ = open_chain(path)
    remembered = Head(9, "ab" * 32)
    with pytest.raises(LedgerDamaged, match="row 9"):
        chain.witness(remembered, remembered.sign(COORDINATOR), COORDINATOR.public_key())


def test_an_older_counter_signed_head_does_not_replace_a_newer_one(path):
    chain, _ = open_chain(path)
    older = chain.head
    append(chain, 6)
    for head in (chain.head, older, GENESIS):
        chain.witness(head, head.sign(COORDINATOR), COORDINATOR.public_key())
    kept = json.loads(path.with_name(path.name + ".witness").read_text())
    assert kept["seq"] == 6
    assert chain.verify(trusted=COORDINATOR.public_key()) == chain.head


def test_a_counter_signature_of_someone_else_is_refused(path):
    chain, _ = open_chain(path)
    head, stranger = chain.head, Ed25519PrivateKey.generate()
    with pytest.raises(LedgerDamaged, match="signature"):
        chain.witness(head, head.sign(stranger), COORDINATOR.public_key())
    with pytest.raises(LedgerDamaged, match="missing"):
        chain.verify(trusted=COORDINATOR.public_key())
    chain.witness(head, head.sign(stranger), stranger.public_key())
    with pytest.raises(LedgerDamaged, match="signature"):
        chain.verify(trusted=COORDINATOR.public_key())


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"seq": 1}'])
def test_a_counter_signed_head_that_is_none_is_refused(path, content):
    witness = path.with_name(path.name + ".witness")
    witness.write_bytes(content)
    witness.chmod(0o600)
    refused(path)


def test_a_signature_that_a_power_cut_took_counts_as_none(path):
    """It is not waited for: the signer remembers it, and the site's audit log does."""
    chain, _ = open_chain(path)
    chain.witness(chain.head, chain.head.sign(COORDINATOR), COORDINATOR.public_key())
    path.with_name(path.name + ".witness").write_bytes(b"")
    assert open_chain(path)[0].witnessed() is None
    with pytest.raises(LedgerDamaged, match="missing"):
        chain.verify(trusted=COORDINATOR.public_key())
