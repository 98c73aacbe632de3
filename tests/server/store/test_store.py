"""The durable store: migrations, sealed content, one transaction a round."""

import sqlite3

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, event, insert

from silotune.protocol.errors import StoreUnusable
from silotune.rounds.run_directory import packed, unpacked
from silotune.server.errors import NotPossibleNow
from silotune.server.store import database
from silotune.server.store.database import Store, migrate
from silotune.server.store.runs import Runs, RunWriter
from silotune.trust.signed import SignedPlan
from silotune.trust.vault import Vault
from tests.server.coordinator_material import LAYOUT, small_plan, store_url


@pytest.fixture
def store(tmp_path):
    made = Store(store_url(tmp_path), vault=Vault(tmp_path / "keys"))
    yield made
    made.close()


@pytest.fixture
def record(store):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    plan = small_plan()
    signed = SignedPlan.sign(plan, Ed25519PrivateKey.generate())
    Runs(store).propose(plan, signed, run="r", quorum=2)
    return RunWriter(store, "r", on_event=lambda: None, on_checkpoint=lambda number: None)


def save(record, number):
    flat = np.full(LAYOUT.size, number, dtype=np.float32)
    record.save_adapter(number, LAYOUT.unpack(flat))
    record.save_checkpoint({"adapter": flat}, {"round": number, "plan_sha256": "p"})


def test_the_migrations_make_exactly_the_tables_of_the_code(tmp_path):
    with create_engine(store_url(tmp_path)).begin() as connection:
        migrate(connection)
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, database.METADATA) == []
        migrate(connection)  # and a second time changes nothing


def test_of_a_secure_round_what_is_settled_last_is_kept_sealed(store, record):
    record.save_secure_round(1, b"cohort of round one")
    record.save_secure_round(2, b"cohort of round two")
    assert record.load_secure_round(1) is None
    assert record.load_secure_round(2) == b"cohort of round two"
    with store.transaction() as connection:
        kept = connection.execute(database.SECURE_ROUNDS.select()).mappings().one()["content"]
    assert b"cohort" not in kept


def test_a_database_of_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "c.sqlite"
    vault = Vault(tmp_path / "keys")
    Store(f"sqlite:///{path}", vault=vault).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreUnusable):
        Store(f"sqlite:///{path}", vault=vault)


@pytest.mark.parametrize("url", ["", "nonsense", "nodialect://x", "sqlite:////no/such/folder/c.db"])
def test_what_cannot_be_opened_is_said_so(tmp_path, url):
    with pytest.raises(StoreUnusable):
        Store(url, vault=Vault(tmp_path / "keys"))


def test_the_file_is_private(tmp_path):
    Store(f"sqlite:///{tmp_path / 'p.sqlite'}", vault=Vault(tmp_path / "keys")).close()
    assert (tmp_path / "p.sqlite").stat().st_mode & 0o077 == 0


def test_a_checkpoint_comes_back_bit_for_bit_and_replaces_the_one_before(record):
    assert record.load_checkpoint() is None
    save(record, 1)
    save(record, 2)
    arrays, state = record.load_checkpoint()
    assert state == {"round": 2, "plan_sha256": "p"}
    assert arrays["adapter"].tobytes() == np.full(LAYOUT.size, 2, np.float32).tobytes()


def test_a_checkpoint_is_written_over_the_last_and_no_row_of_megabytes_is_deleted(store, record):
    """With secure_delete, a deleted one is overwritten with zeros first: twice the bytes a round."""
    save(record, 1)
    asked = []
    event.listen(
        store._engine, "before_cursor_execute", lambda c, r, words, *_: asked.append(words)
    )
    save(record, 2)
    record.save_secure_round(2, b"x")
    record.save_secure_round(3, b"y")
    written = [words.split()[:3] for words in asked if "checkpoints" in words]
    assert [words[0] for words in written] == ["UPDATE"]
    assert not any("run=" in words.split("WHERE")[0] for words in asked if "UPDATE ch" in words)
    assert not any(words.startswith(f"DELETE FROM {t}") for words in asked for t in LARGE)
    assert (record.load_checkpoint()[1]["round"], record.load_secure_round(3)) == (2, b"y")
    assert record.load_secure_round(2) is None


LARGE = ("checkpoints", "secure_rounds")


def test_adapters_of_the_newest_rounds_are_kept_and_of_all_their_hashes(store, record):
    for number in range(1, 6):
        save(record, number)
    number, digest, arrays = Runs(store).newest_adapter("r")
    assert number == 5
    assert LAYOUT.pack(arrays)[0] == 5.0
    with store.transaction() as connection:
        rows = connection.execute(
            database.ADAPTERS.select().order_by(database.ADAPTERS.c.round)
        ).all()
    assert [row.content is not None for row in rows] == [False, False, True, True, True]
    assert len({row.sha256 for row in rows}) == 5
    assert rows[-1].sha256 == digest


def test_weights_are_nowhere_on_the_disk_in_clear(tmp_path, store, record):
    flat = np.random.default_rng(0).normal(size=LAYOUT.size).astype(np.float32)
    record.save_adapter(1, LAYOUT.unpack(flat))
    record.save_checkpoint({"adapter": flat}, {"round": 1})
    store.close()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert flat[:4].tobytes() not in path.read_bytes()


def test_a_sealed_checkpoint_of_another_run_is_not_taken(store, record):
    save(record, 1)
    with store.transaction() as connection:
        row = connection.execute(database.CHECKPOINTS.select()).mappings().one()
        run = connection.execute(database.RUNS.select()).mappings().one()
        connection.execute(insert(database.RUNS).values({**run, "run": "other"}))
        connection.execute(insert(database.CHECKPOINTS).values({**row, "run": "other"}))
    other = RunWriter(store, "other", on_event=lambda: None, on_checkpoint=lambda n: None)
    with pytest.raises(Exception, match=r"ST-431"):
        other.load_checkpoint()


def test_events_are_numbered_and_read_on_from_any_of_them(store, record):
    for number in range(4):
        record.append_event("round_started", round=number, cohort=["a"], nan=float("nan"))
    found = Runs(store).events("r")
    assert [event.fields["round"] for event in found] == [0, 1, 2, 3]
    assert found[0].fields["nan"] is None
    later = Runs(store).events("r", after=found[1].id)
    assert [event.id for event in later] == [found[2].id, found[3].id]


def test_an_unknown_run_is_said_so(store):
    with pytest.raises(NotPossibleNow, match="'nothing'"):
        Runs(store).get("nothing")


def test_equal_arrays_have_equal_bytes_and_damage_is_noticed():
    arrays = {"b": np.ones((2, 3), np.float32).T, "a": np.arange(3)}
    content = packed(arrays, {"round": 1})
    assert content == packed(dict(reversed(arrays.items())), {"round": 1})
    found, state = unpacked(content)
    assert state == {"round": 1}
    assert np.array_equal(found["b"], arrays["b"])
    for bad in (b"", content[:-1], content[:20]):
        with pytest.raises(StoreUnusable):
            unpacked(bad)
