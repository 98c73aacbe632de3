"""What the coordinator takes from inside Flower: what changes there must be looked at."""

import inspect

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.supercore.error import http_error_translator
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from sqlalchemy import event

from silotune.flower.superlink import REQUESTS, LinkState, superlink_app
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
    assert link._state.activate_node(made, 10.0)
    return made


def push(link, run, to, *, number=1):
    content = RecordDict({"config": ConfigRecord({"round": number})})
    return link.push(run, node=to, kind="train", group=f"{number}.x", ttl=60.0, content=content)


def counts(link):
    tables = ("message_ins", "message_res", "objects")
    rows = [link._state.query(f"SELECT COUNT(*) AS n FROM {t}")[0]["n"] for t in tables]
    return [*rows, len(link._store)]


def test_the_configuration_has_exactly_the_fields_that_are_set():
    assert len(inspect.signature(SuperLinkLifespanConfig).parameters) == 22


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


def test_the_app_has_the_fleet_paths_that_the_guard_lets_through(tmp_path):

    app = superlink_app(tmp_path / "x.sqlite")
    schema = app.openapi()["paths"]
    assert set(REQUESTS) <= set(schema)
    assert set(schema) - set(REQUESTS) == {  # nothing of the control and the runtime API
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-run",
        "/v1/fleet/get-fab",
    }
    layers = [(layer.cls.__name__, layer.kwargs) for layer in app.user_middleware]
    assert layers == [
        ("BaseHTTPMiddleware", {"dispatch": http_error_translator}),
        ("ProtobufTranslationMiddleware", {}),
        ("NodeAuthMiddleware", {}),
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
        "message_ins": "message_id, dst_node_id, message_type, group_id, delivered_at, created_at, ttl",
        "message_res": "message_id, reply_to_message_id, src_node_id, run_id",
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


def test_an_instruction_waits_is_handed_out_and_forgotten_without_a_trace(link, run):
    to = node(link)
    message_id = push(link, run, to)
    assert link.has_work(to)
    (handed,) = link._state.get_message_ins(node_id=to, limit=1)
    assert handed.metadata.message_id == message_id
    (known,) = link.instructions(run)
    assert (known.node, known.kind, known.group, known.delivered) == (to, "train", "1.x", True)
    link.forget([message_id])
    assert counts(link) == [0, 0, 0, 0]


def test_the_next_process_finds_messages_and_drops_what_belongs_to_none(tmp_path):
    vault = Vault(tmp_path / "keys")
    first = LinkState(tmp_path / "link.sqlite", vault=vault)
    run = first.new_run()
    kept, lost = push(first, run, node(first, "a")), push(first, run, node(first, "b"), number=2)
    first._state.query("DELETE FROM message_ins WHERE message_id=:m", {"m": lost})
    objects = len(first._store)
    second = LinkState(tmp_path / "link.sqlite", vault=vault)
    assert [found.message_id for found in second.instructions(run)] == [kept]
    assert kept in second._store
    assert lost not in second._store
    assert 0 < len(second._store) < objects


def test_an_unconfirmed_instruction_is_handed_out_again(link, run):
    to = node(link)
    push(link, run, to)
    link._state.get_message_ins(node_id=to, limit=1)
    assert link.has_work(to)  # it asks again, so it never got it
    assert link._state.get_message_ins(node_id=to, limit=1)


def test_a_confirmed_instruction_is_not_handed_out_again(link, run):
    to = node(link)
    message_id = push(link, run, to)
    link._state.get_message_ins(node_id=to, limit=1)
    link._store.delete(message_id)  # what confirming does
    assert not link.has_work(to)
    assert not link._state.get_message_ins(node_id=to, limit=1)


def test_an_expired_instruction_is_neither_work_nor_handed_out(link, run):
    to = node(link)
    push(link, run, to)
    link._state.query("UPDATE message_ins SET created_at = created_at - 1000")
    assert not link.has_work(to)
    assert link.instructions(run)[0].expired
    assert not link._state.get_message_ins(node_id=to, limit=1)


def test_nothing_is_stored_for_a_node_that_was_never_there(link, run):
    before = counts(link)
    silent = link.register(identity.public_pem(identity.new_node_key().public_key()), "s")
    assert push(link, run, silent) == ""
    assert counts(link) == before


def test_a_node_that_was_killed_comes_back_at_once_and_listeners_hear_of_it(link):
    heard = []
    link.on_activation(listener := lambda node, was_online: heard.append((node, was_online)))
    made = node(link)
    assert link._state.activate_node(made, 10.0)  # stock Flower refuses this for a minute
    link.remove_listener(listener)
    assert heard == [(made, False), (made, True)]


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


def test_what_is_addressed_to_a_node_is_known_by_message(link, run):
    one, other = node(link), node(link)
    mine, theirs = push(link, run, one), push(link, run, other, number=2)
    assert set(link.addressed_to(one)) == {mine}
    assert mine in link.addressed_to(one)[mine]
    assert theirs not in link.addressed_to(one)[mine]


def test_the_bookkeeping_that_nobody_needs_is_left_out_of_a_request(link, run):
    """By what the database is asked; Flower's own classes would write three times here."""
    written = []

    def note(connection, cursor, statement, *rest):
        if statement.split()[0] in {"UPDATE", "INSERT", "DELETE"}:
            written.append(statement)

    engine, state = link._state._engine, type(link._state)
    event.listen(engine, "before_cursor_execute", note)
    try:
        status = link._state.get_run_status({run.run_id})[run.run_id]
        link._state.store_traffic(run.run_id, bytes_sent=1, bytes_recv=1)
        assert (status.status, written) == ("running", [])
        state._cleanup_expired_task_tokens(link._state)
        state.store_traffic(link._state, run.run_id, bytes_sent=1, bytes_recv=1)
        assert len(written) >= 3
    finally:
        event.remove(engine, "before_cursor_execute", note)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA cache_size").scalar() == -2000
