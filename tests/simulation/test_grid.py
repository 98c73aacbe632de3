"""WorkerGrid keeps Flower's promises, and some of its own: pinned sites, codes only, equal bits."""

import os
import stat
import time

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg
from grid_material import FOUR, by_id, by_node, grid, messages, pull_all, reasons

from silotune.simulation import pool
from silotune.simulation.grid import Receipt


@pytest.fixture(autouse=True)
def no_process_is_left_behind():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before


# --- as Flower has it ---


@pytest.fixture(scope="module")
def two_workers():
    with grid(2) as shared:
        shared.wait_until_ready()
        yield shared


def test_each_site_answers_in_its_own_name(two_workers):
    replies = by_node(two_workers.send_and_receive(messages([1, 2, 3, 4]), timeout=120))
    assert sorted(replies) == two_workers.get_node_ids() == [1, 2, 3, 4]
    for node, reply in replies.items():
        update = reply.content["update"]["flat"].numpy()
        np.testing.assert_array_equal(update, np.array([1, 2], np.float32) * node)


def test_sites_stay_with_the_worker_they_were_given_by_weight(two_workers):
    played = []
    for _ in range(2):
        replies = by_node(two_workers.send_and_receive(messages([1, 2, 3, 4]), timeout=120))
        played.append({n: r.content["released"]["pid"] for n, r in replies.items()})
    assert played[0] == played[1]
    pids = played[0]
    assert pids[1] == pids[4] != pids[2] == pids[3]  # 4 + 2 against 3 + 2
    assert os.getpid() not in pids.values()


def test_a_site_finds_itself_in_its_context(two_workers):
    reply = two_workers.send_and_receive(messages([3], kind="query.who"), timeout=120)[0]
    assert dict(reply.content["who"]) == {
        "run": 1,
        "node": 3,
        "partition-id": 2,
        "num-partitions": 4,
        "site": "skin",
    }


def test_a_reply_names_its_message_its_run_and_its_round(two_workers):
    sent = messages([2], group="17", kind="train.step")
    [message_id] = two_workers.push_messages(sent)
    [reply] = pull_all(two_workers, [message_id])
    assert sent[0].metadata.message_id == message_id == reply.metadata.reply_to_message_id
    assert reply.metadata.run_id == 1
    assert (reply.metadata.group_id, reply.metadata.message_type) == ("17", "train.step")
    assert reply.metadata.message_id != ""


def test_flowers_own_strategy_runs_on_it_unmodified(two_workers):
    start = ArrayRecord({"flat": Array(np.ones(3, np.float32))})

    class Adapted(FedAvg):
        def aggregate_train(self, server_round, replies):
            for reply in replies:
                reply.content["released"]["num-examples"] = 1
                del reply.content["released"]["pid"]
            return super().aggregate_train(server_round, replies)

    strategy = Adapted(fraction_evaluate=0.0, arrayrecord_key="arrays", configrecord_key="config")
    result = strategy.start(grid=two_workers, initial_arrays=start, num_rounds=2)
    # each round multiplies by the mean of the node ids 1 to 4
    np.testing.assert_allclose(result.arrays["flat"].numpy(), 2.5**2)


def test_replies_stream_back_as_sites_finish(two_workers):
    sent = messages([1, 2], **{"sleep-1": 1.5})
    slow, fast = two_workers.push_messages(sent)
    first = []
    while not first:
        two_workers.wait(5.0)
        first = two_workers.pull_messages([slow, fast])
    assert [reply.metadata.src_node_id for reply in first] == [2]
    assert [reply.metadata.src_node_id for reply in pull_all(two_workers, [slow])] == [1]


def test_only_what_is_asked_for_is_pulled(two_workers):
    first, second = two_workers.push_messages(messages([1, 2]))
    assert {r.metadata.src_node_id for r in pull_all(two_workers, [second])} == {2}
    assert {r.metadata.src_node_id for r in pull_all(two_workers, [first])} == {1}
    assert two_workers.pull_messages([first, second]) == []


def test_waiting_ends_at_the_timeout_when_nothing_comes(two_workers):
    two_workers.pull_messages([])
    started = time.monotonic()
    assert not two_workers.wait(0.1)
    assert 0.05 < time.monotonic() - started < 20


def test_a_time_limit_gives_what_there_is(two_workers):
    sent = messages([1, 2], **{"sleep-1": 3.0})
    replies = two_workers.send_and_receive(sent, timeout=2.0)
    assert [reply.metadata.src_node_id for reply in replies] == [2]
    pull_all(two_workers, [sent[0].metadata.message_id])


def test_a_message_to_nobody_is_refused(two_workers):
    with pytest.raises(ValueError, match="no node 5"):
        two_workers.push_messages(messages([5]))
    with pytest.raises(ValueError, match="no node 0"):
        two_workers.push_messages(messages([0]))


def test_a_message_is_not_sent_again_before_it_is_answered(two_workers):
    [message] = messages([1])
    ids = two_workers.push_messages([message])
    with pytest.raises(ValueError, match="sent before"):
        two_workers.push_messages([message])
    pull_all(two_workers, ids)
    pull_all(two_workers, two_workers.push_messages([message]))


def test_what_a_site_prints_does_not_disturb_the_messages(two_workers):
    assert two_workers.send_and_receive(messages([1], do="print"), timeout=120)[0].has_content()


# --- the same code without processes ---


def test_state_lasts_from_message_to_message_and_is_each_sites_own():
    with grid(0) as inline:
        for expected in (1, 2):
            replies = by_node(inline.send_and_receive(messages([1, 2])))
            seen = {node: reply.content["released"]["seen"] for node, reply in replies.items()}
            assert seen == {1: expected, 2: expected}
        assert inline.send_and_receive(messages([3]))[0].content["released"]["seen"] == 1


def test_without_workers_the_sites_run_in_this_process():
    with grid(0) as inline:
        ready = []
        inline.wait_until_ready(ready.append)
        assert [(r.worker, r.sites) for r in ready] == [(0, ("eye", "heart", "skin", "bone"))]
        assert inline.send_and_receive(messages([2]))[0].content["released"]["pid"] == os.getpid()


def test_a_receipt_tells_the_simulator_what_the_server_can_not_know():
    receipts = []
    with grid(0, on_receipt=receipts.append) as inline:
        values = np.zeros(1000)
        inline.send_and_receive(messages([2], values=values, group="5", **{"sleep-2": 0.05}))
    [receipt] = receipts
    assert isinstance(receipt, Receipt)
    assert (receipt.site, receipt.message_type, receipt.group_id) == ("heart", "train", "5")
    assert 0.05 <= receipt.seconds < 5
    assert 4000 < receipt.bytes_down < 6000
    assert 4000 < receipt.bytes_up < 6000


@pytest.mark.parametrize("workers", [0, 1])
def test_an_instruction_that_has_expired_is_not_carried_out(workers):
    receipts = []
    with grid(workers, sites=FOUR[:2], on_receipt=receipts.append) as some:
        some.wait_until_ready()
        slow, late = messages([1, 2], ttl=0.5, **{"sleep-1": 0.8})
        assert some.send_and_receive([slow, late], timeout=1.5) == []
        replies = some.send_and_receive(messages([2]))
    assert [reply.content["released"]["seen"] for reply in replies] == [1]
    assert len(receipts) == 1


def test_bits_do_not_depend_on_the_number_of_workers(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what a machine of two cores would do by itself
    values = np.random.default_rng(5).normal(size=250_000)
    found = []
    for workers in (1, 2):
        with grid(workers, sites=FOUR[:2], factory="build_torch") as some:
            replies = by_node(some.send_and_receive(messages([1, 2], values=values), timeout=60))
        assert {r.content["released"]["threads"] for r in replies.values()} == {1}
        found.append({n: r.content["update"]["flat"].numpy() for n, r in replies.items()})
    for node in (1, 2):
        assert found[0][node].tobytes() == found[1][node].tobytes()


# --- content travels once ---


def test_what_all_sites_get_is_sent_to_a_worker_once_and_dropped_after_the_round(monkeypatch):
    frames = []
    send = pool.send_frame
    monkeypatch.setattr(
        pool, "send_frame", lambda to, frame: (frames.append(frame), send(to, frame))
    )
    with grid(2) as some:
        for _ in range(2):
            some.send_and_receive(messages([1, 2, 3, 4], values=np.zeros(1000)), timeout=120)
    kinds = [frame.kind for frame in frames]
    assert kinds.count("message") == 8
    large = [blob for frame in frames for blob in frame.blobs if len(blob) > 4000]
    assert len(large) == 4  # two workers, two rounds
    assert kinds.count("forget") == 4


def test_content_does_not_pile_up_where_messages_overlap_without_end(monkeypatch):
    monkeypatch.setattr(pool, "_MOST_STALE_BYTES", 10_000)
    forgotten, forget = [], pool.Worker.forget
    monkeypatch.setattr(pool.Worker, "forget", lambda link: forgotten.append(forget(link)))
    with grid(0) as inline:
        ids = []
        for value in range(10):  # nothing is pulled, so that there is always an open message
            ids += inline.push_messages(messages([1, 2], values=np.full(1000, value)))
            assert sum(inline._pool.links[0]._held.values()) < 20_000
        assert forgotten
        updates = by_id(pull_all(inline, ids))
    for number, message_id in enumerate(ids):
        np.testing.assert_array_equal(
            updates[message_id], np.full(1000, number // 2 * (1 + number % 2), np.float32)
        )


# --- errors ---


@pytest.mark.parametrize(
    ("how", "code"),
    [("coded", "ST-401"), ("text", "ST-000"), ("odd code", "ST-000"), ("exit", "ST-000")],
)
def test_only_a_stable_code_of_an_error_leaves_the_site(how, code, caplog):
    with grid(0) as inline:
        [reply] = inline.send_and_receive(messages([2], do=how))
        assert (reply.error.code, reply.error.reason) == (2, code)
        assert reply.metadata.src_node_id == 2
        assert inline.send_and_receive(messages([2]))[0].has_content()
    assert "patient 4711" in caplog.text  # for whoever may read the site's own log
    assert "site heart" in caplog.text


def test_a_reply_that_is_none_becomes_an_error():
    with grid(0, factory="build_wrong_replies") as inline:
        replies = inline.send_and_receive(messages([1]) + messages([2], kind="train.step"))
        assert reasons(replies) == ["ST-000", "ST-000"]


def test_a_message_type_without_a_function_becomes_an_error():
    with grid(0) as inline:
        assert reasons(inline.send_and_receive(messages([1], kind="train.unheard"))) == ["ST-000"]


def test_the_traceback_is_in_the_workers_log_which_only_its_owner_can_read(tmp_path):
    with grid(1, log_folder=tmp_path / "logs") as some:
        assert reasons(some.send_and_receive(messages([1], do="text"), timeout=120)) == ["ST-000"]
    log = tmp_path / "logs" / "worker-0.log"
    assert "ValueError: patient 4711" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
