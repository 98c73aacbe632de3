"""What the coordinator takes from inside Flower: what changes there must be looked at."""

import inspect

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.app.metadata import Metadata
from sqlalchemy import event

from silotune.flower.link_messages import Outgoing
from silotune.flower.superlink import LinkState
from silotune.protocol.errors import StoreUnusable
from silotune.trust import identity
from silotune.trust.vault import Vault


@pytest.fixture(scope="module")
def link(tmp_path_factory):
    folder = tmp_path_factory.mktemp("link")
    return LinkState(folder / "link.sqlite", vault=Vault(folder / "keys"))


@pytest.fixture
def run(link):
    made = link.new_run()
    yield made
    link.finish_run(made)


def node(link, name="n"):
    made = link.register(identity.public_pem(identity.new_node_key().public_key()), name)
    assert link.activate(made, heartbeat=10.0)
    return made


def push(link, run, to):
    content = RecordDict({"config": ConfigRecord({"round": 1})})
    made = Outgoing(node=to, kind="train", group="1.x", ttl=60.0, content=content)
    return link.push(run, [made])[0]


def test_signatures_that_are_called_by_position_are_as_they_were():
    assert list(inspect.signature(Metadata).parameters)[:9] == [
        "run_id",
        "message_id",
        "src_node_id",
        "dst_node_id",
        "reply_to_message_id",
        "group_id",
        "created_at",
        "ttl",
        "message_type",
    ]


def test_a_link_state_of_a_newer_flower_is_refused_and_may_be_made_anew(tmp_path):
    database, vault = tmp_path / "link.sqlite", Vault(tmp_path / "keys")
    LinkState(database, vault=vault)._state.query("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreUnusable, match="newer version of Flower") as refused:
        LinkState(database, vault=vault)
    assert "remove link.sqlite*" in refused.value.remedy
    for part in tmp_path.glob("link.sqlite*"):
        part.unlink()
    assert LinkState(database, vault=vault).sightings() == {}


def test_the_tables_that_are_read_directly_have_the_columns(link):
    for table, columns in {
        "message_ins": "message_id, run_id, dst_node_id, message_type, group_id, created_at, ttl",
        "message_res": "message_id, reply_to_message_id",
        "node": "node_id, status, online_until",
        "task": "task_id, token, active_until",
    }.items():
        link._state.query(f"SELECT {columns} FROM {table}")


def test_a_key_is_registered_once_and_cannot_come_back(link):
    pem = identity.public_pem(identity.new_node_key().public_key())
    made = link.register(pem, "a")
    assert link.register(pem, "a") == made
    link.unregister(made)
    with pytest.raises(ValueError, match="already"):
        link.register(pem, "a")


def test_nothing_is_stored_for_a_node_that_was_never_there(link, run):
    silent = link.register(identity.public_pem(identity.new_node_key().public_key()), "s")
    assert push(link, run, silent) == ""
    assert link.messages.instructions(run) == []
    assert push(link, run, node(link)) != ""


def test_a_node_is_there_until_it_says_goodbye_or_its_signs_of_life_stay_away(link):
    made = node(link)
    assert link.sightings()[made].online
    link.deactivate(made)
    assert not link.sightings()[made].online
    link.heartbeat(made, seconds=10.0)
    assert link.sightings()[made].online
    assert link.sightings() == {
        info.node_id: link.sightings()[info.node_id] for info in link._state.get_node_info()
    }
    link._state.query("UPDATE node SET online_until = online_until - 30")
    assert not link.sightings()[made].online
    assert {
        info.node_id: (info.status == "online", info.online_until or 0.0)
        for info in link._state.get_node_info()
    } == {number: (one.online, one.until) for number, one in link.sightings().items()}


def test_a_node_that_was_killed_comes_back_at_once(link):
    made, before = node(link), link.arrived.count
    assert link.activate(made, heartbeat=10.0)  # stock Flower refuses this for a minute
    assert link.arrived.count == before + 1
    assert not link._state.activate_node(made, 10.0)


def test_a_run_needs_no_heartbeat_and_is_found_again_until_it_is_finished(link):
    made = link.new_run()
    row = link._state.query(
        "SELECT token, active_until FROM task WHERE run_id=:r",
        {"r": made.run_id if made.run_id < 2**63 else made.run_id - 2**64},
    )
    assert row == [{"token": None, "active_until": None}]
    assert link.find_run(made.run_id) == made
    link.finish_run(made)
    assert link.find_run(made.run_id) is None


def test_the_bookkeeping_that_nobody_needs_is_left_out(link, run):
    """By what the database is asked; Flower's own class would write here."""
    written = []

    def note(connection, cursor, statement, *rest):
        if statement.split()[0] in {"UPDATE", "INSERT", "DELETE"}:
            written.append(statement)

    engine, state = link._state._engine, type(link._state)
    event.listen(engine, "before_cursor_execute", note)
    try:
        status = link._state.get_run_status({run.run_id})[run.run_id]
        assert (status.status, written) == ("running", [])
        state._cleanup_expired_task_tokens(link._state)
        assert len(written) >= 1
    finally:
        event.remove(engine, "before_cursor_execute", note)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA cache_size").scalar() == -2000
