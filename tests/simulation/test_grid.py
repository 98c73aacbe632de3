"""WorkerGrid keeps Flower's promises, and some of its own: pinned sites, codes only, no orphans."""

import contextlib
import itertools
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.errors import EnvironmentFault, ModelNotFound, SiteFailed, WorkerDied
from silotune.simulation import links
from silotune.simulation.grid import Receipt, SiteSlot, WorkerGrid
from silotune.simulation.pool import spread

FOUR = [SiteSlot("eye", 4.0), SiteSlot("heart", 3.0), SiteSlot("skin", 2.0), SiteSlot("bone", 2.0)]


@pytest.fixture(autouse=True)
def no_process_is_left_behind():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before


def grid(workers, sites=FOUR, factory="build", **options):
    return WorkerGrid(f"grid_programs:{factory}", {"word": "x"}, sites, workers=workers, **options)


def arrays_of(values=(1.0, 2.0)):
    return ArrayRecord({"flat": Array(np.array(values, dtype=np.float32))})


def messages(nodes, *, values=(1.0, 2.0), kind="train", ttl=None, group="1", **config):
    content = RecordDict({"arrays": arrays_of(values), "config": ConfigRecord(config)})
    return [Message(content, node, kind, group_id=group, ttl=ttl) for node in nodes]


def by_node(replies):
    return {reply.metadata.src_node_id: reply for reply in replies}


def reasons(replies):
    return [reply.error.reason for reply in replies]


# --- sharing out ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 3))
def test_no_worker_has_more_than_four_thirds_of_the_best_possible_load(weights, workers):
    shares = spread(weights, workers)
    assert sorted(itertools.chain(*shares)) == list(range(len(weights)))
    assert len(shares) == min(workers, len(weights))
    best = min(
        max(sum(w for w, k in zip(weights, plan, strict=True) if k == j) for j in range(workers))
        for plan in itertools.product(range(workers), repeat=len(weights))
    )
    heaviest = max(sum(weights[site] for site in share) for share in shares)
    assert heaviest <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9  # Graham's bound


# --- as Flower has it ---


@pytest.fixture(scope="module")
def two_workers():
    with grid(2, run_id=11, run_config={"rounds": 3, "fast": True}) as shared:
        shared.wait_until_ready()
        yield shared


def test_each_site_answers_in_its_own_name(two_workers):
    replies = by_node(two_workers.send_and_receive(messages([1, 2, 3, 4]), timeout=30))
    assert sorted(replies) == two_workers.get_node_ids() == [1, 2, 3, 4]
    for node, reply in replies.items():
        update = reply.content["update"]["flat"].numpy()
        np.testing.assert_array_equal(update, np.array([1, 2], np.float32) * node)


def test_sites_stay_with_the_worker_they_were_given_by_weight(two_workers):
    played = []
    for _ in range(2):
        replies = by_node(two_workers.send_and_receive(messages([1, 2, 3, 4]), timeout=30))
        played.append({n: r.content["released"]["pid"] for n, r in replies.items()})
    assert played[0] == played[1]
    pids = played[0]
    assert pids[1] == pids[4] != pids[2] == pids[3]  # 4 + 2 against 3 + 2
    assert os.getpid() not in pids.values()


def test_a_site_finds_itself_and_the_runs_settings_in_its_context(two_workers):
    reply = two_workers.send_and_receive(messages([3], kind="query.who"), timeout=30)[0]
    assert dict(reply.content["who"]) == {
        "run": 11,
        "node": 3,
        "partition-id": 2,
        "num-partitions": 4,
        "site": "skin",
        "run-config": "[('fast', True), ('rounds', 3)]",
    }


def test_a_reply_names_its_message_its_run_and_its_round(two_workers):
    sent = messages([2], group="17", kind="train.step")
    [message_id] = two_workers.push_messages(sent)
    [reply] = pull_all(two_workers, [message_id])
    assert sent[0].metadata.message_id == message_id == reply.metadata.reply_to_message_id
    assert reply.metadata.run_id == 11
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


def pull_all(some_grid, ids, *, deaths=(), timeout=30.0):
    ends, missing, replies = time.monotonic() + timeout, set(ids), []
    while missing and time.monotonic() < ends:
        try:
            pulled = some_grid.pull_messages(missing)
        except WorkerDied as exc:
            deaths.append(exc)
            continue
        missing -= {reply.metadata.reply_to_message_id for reply in pulled}
        replies += pulled
        if missing and not pulled:
            some_grid.wait(1.0)
    assert not missing
    return replies


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
    assert 0.05 < time.monotonic() - started < 2


def test_a_time_limit_gives_what_there_is(two_workers):
    sent = messages([1, 2], **{"sleep-1": 2.0})
    replies = two_workers.send_and_receive(sent, timeout=1.0)
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
    assert two_workers.send_and_receive(messages([1], do="print"), timeout=30)[0].has_content()


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
    send = links.send_frame
    monkeypatch.setattr(
        links, "send_frame", lambda to, frame: (frames.append(frame), send(to, frame))
    )
    with grid(2) as some:
        for _ in range(2):
            some.send_and_receive(messages([1, 2, 3, 4], values=np.zeros(1000)), timeout=30)
    kinds = [frame.kind for frame in frames]
    assert kinds.count("message") == 8
    large = [blob for frame in frames for blob in frame.blobs if len(blob) > 4000]
    assert len(large) == 4  # two workers, two rounds
    assert kinds.count("forget") == 4


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
        assert reasons(some.send_and_receive(messages([1], do="text"), timeout=30)) == ["ST-000"]
    log = tmp_path / "logs" / "worker-0.log"
    assert "ValueError: patient 4711" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@pytest.mark.parametrize("workers", [0, 1])
def test_what_kept_a_worker_from_starting_is_raised_here(workers, tmp_path):
    with grid(workers, factory="build_without_model", log_folder=tmp_path) as some:
        with pytest.raises(ModelNotFound, match="no folder 'minilm' here"):
            some.wait_until_ready()
        assert some.get_node_ids() == []


def test_a_bug_at_the_start_is_not_quoted(caplog):
    with grid(0, factory="build_with_a_bug") as inline:
        with pytest.raises(WorkerDied, match="ZeroDivisionError") as caught:
            inline.pull_messages([])
        assert "4711" not in str(caught.value)


def test_a_factory_that_is_not_there_is_named():
    with grid(0, factory="bild") as inline, pytest.raises(EnvironmentFault, match="bild"):
        inline.wait_until_ready()


def test_two_sites_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        grid(0, sites=[SiteSlot("eye"), SiteSlot("eye")])


# --- a worker dies ---


def test_a_dead_worker_is_raised_once_and_then_its_sites_give_errors():
    with grid(2) as some:
        some.wait_until_ready()
        dying, fine = messages([1], do="die") + messages([4]), messages([2, 3])
        lost, kept = some.push_messages(dying), some.push_messages(fine)
        deaths = []
        replies = by_node(pull_all(some, lost + kept, deaths=deaths))
        assert len(deaths) == 1
        assert "exited with 3; it played eye, bone" in str(deaths[0])
        assert reasons([replies[1], replies[4]]) == ["ST-604", "ST-604"]
        assert replies[2].has_content() and replies[3].has_content()
        assert some.get_node_ids() == [2, 3]
        assert reasons(some.send_and_receive(messages([4]))) == ["ST-604"]
        with pytest.raises(WorkerDied, match="bone"):
            some.inspect_all({}, {"x": np.zeros(1)}, ["bone"])


def test_a_worker_that_is_killed_says_so_to_whoever_waits():
    with grid(1) as some:
        worker = some.send_and_receive(messages([1]), timeout=30)[0].content["released"]["pid"]
        ids = some.push_messages(messages([1], **{"sleep-1": 60.0}))
        os.kill(worker, signal.SIGKILL)
        assert some.wait(20.0)
        with pytest.raises(WorkerDied, match="SIGKILL"):
            some.pull_messages(ids)


def test_a_worker_that_dies_before_it_is_ready_is_noticed():
    with (
        grid(1, factory="build_and_die") as some,
        pytest.raises(WorkerDied, match="exited with 7"),
    ):
        some.wait_until_ready()


def test_closing_ends_workers_in_the_middle_of_their_work():
    others = psutil.Process().children()
    some = grid(2)
    some.wait_until_ready()
    some.push_messages(messages([1, 2], **{"sleep-1": 60.0, "sleep-2": 60.0}))
    time.sleep(0.2)
    started = time.monotonic()
    some.close()
    some.close()
    assert time.monotonic() - started < 10
    assert psutil.Process().children() == others


# --- the simulator's own view ---


@pytest.mark.parametrize("workers", [0, 2])
def test_inspection_asks_every_site_and_no_site_sees_anothers_arrays(workers):
    with grid(workers) as some:
        given = np.arange(3, dtype=np.float32)
        found = some.inspect_all({"split": "test"}, {"x": given})
        assert list(found) == ["eye", "heart", "skin", "bone"]
        assert [answer["site"] for answer, _ in found.values()] == [0, 1, 2, 3]
        assert {answer["word"] for answer, _ in found.values()} == {"x"}
        for site, (_, arrays) in enumerate(found.values()):
            np.testing.assert_array_equal(arrays["x"], np.float32([-1, 1, 2]) + site)
            assert arrays["x"].flags.writeable
        np.testing.assert_array_equal(given, [0, 1, 2])
        assert list(some.inspect_all({}, {"x": given}, ["bone", "heart"])) == ["heart", "bone"]


def test_an_inspection_that_fails_names_the_site_and_the_code_only(caplog):
    with grid(0) as inline:
        with pytest.raises(SiteFailed, match=r"heart.*ST-401") as caught:
            inline.inspect_all({"fail": 1}, {"x": np.zeros(1)})
        assert "4711" not in str(caught.value)
        assert "patient 4711" in caplog.text


def test_an_inspection_of_a_site_that_is_not_there_is_refused():
    with grid(0) as inline, pytest.raises(ValueError, match="nose"):
        inline.inspect_all({}, {}, ["nose"])


def test_objects_do_not_travel_as_arrays():
    with grid(0) as inline, pytest.raises(TypeError, match="object"):
        inline.inspect_all({}, {"x": np.array([object()])})


def test_a_worker_that_dies_of_an_inspection_is_noticed():
    with grid(1) as some, pytest.raises(WorkerDied, match="exited with 9"):
        some.inspect_all({"die": 2}, {"x": np.zeros(1)})


# --- the simulator dies ---

_SCRIPT = """
    import sys, time
    sys.path.insert(0, {here!r})
    from silotune.simulation.grid import SiteSlot, WorkerGrid
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
    import numpy as np, psutil
    with WorkerGrid("grid_programs:build", {{}}, [SiteSlot("eye")], workers=1) as grid:
        grid.wait_until_ready()
        arrays = ArrayRecord({{"flat": Array(np.ones(2, np.float32))}})
        content = RecordDict({{"arrays": arrays, "config": ConfigRecord({{"sleep-1": 60.0}})}})
        grid.push_messages([Message(content, 1, "train")])
        time.sleep(0.3)
        print(psutil.Process().children()[0].pid, flush=True)
        while True:
            grid.wait(60)
"""


@contextlib.contextmanager
def simulator():
    script = textwrap.dedent(_SCRIPT).format(here=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process, psutil.Process(int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def test_workers_die_with_the_simulator_even_in_the_middle_of_a_task():
    with simulator() as (process, worker):
        process.send_signal(signal.SIGKILL)
        assert psutil.wait_procs([worker], timeout=15)[0]


def test_ctrl_c_shows_one_traceback_the_simulators_and_ends_all():
    with simulator() as (process, worker):
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert errors.count("Traceback") == 1
        assert "KeyboardInterrupt" in errors
        assert psutil.wait_procs([worker], timeout=10)[0]
