"""The contract with the pinned Flower: ids, objects and bytes are Flower's own."""

import hashlib
import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable import inflatable_object
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from silotune.flower import messages

FLOWER_CHUNK = 5_242_880


@pytest.fixture(autouse=True)
def server():
    messages.identify(7)


def instruction(content=None, node=3):
    message = Message(content or sample(), node, "train", ttl=60.0, group_id="4")
    messages.stamp(message, run_id=7)
    return message


def sample(values=(1.0, 2.0)):
    flat = Array(np.array(values, dtype=np.float32))
    config = ConfigRecord({"plan": "{}", "round": 4})
    return RecordDict({"arrays": ArrayRecord({"flat": flat}), "config": config})


def contents_of(packed):
    return {key: packed.deflate(key) for key in packed.objects}


@pytest.mark.parametrize("size", [0, 1, 1000, FLOWER_CHUNK // 4, FLOWER_CHUNK // 2])
def test_a_chunk_is_cut_and_read_back_as_flower_does(size):
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    packed = messages.pack(instruction(sample(values)))
    chunks = {key: part for key, part in packed.objects.items() if isinstance(part, ArrayChunk)}
    assert len(chunks) == 1 + size * 4 // FLOWER_CHUNK
    for key, chunk in chunks.items():
        assert packed.deflate(key) == chunk.deflate()
    found = messages.unpack(packed.root, contents_of(packed)).content["arrays"]["flat"]
    assert found.numpy().tobytes() == values.tobytes()


def test_ids_and_objects_are_those_of_flowers_own_tree():
    message = instruction()
    packed = messages.pack(message)
    assert packed.root == message.object_id == get_object_tree(message).object_id
    assert list(packed.objects) == list(get_all_nested_objects(message))
    tree = [node.object_id for node in iterate_object_tree(get_object_tree(message))]
    assert list(packed.objects) == tree
    assert tree[-1] == packed.root


def test_an_object_id_is_the_sha256_of_the_deflated_object():
    packed = messages.pack(instruction())
    for object_id, content in contents_of(packed).items():
        assert hashlib.sha256(content).hexdigest() == object_id
        messages.verify(object_id, content)


def test_content_that_does_not_have_its_id_is_refused():
    packed = messages.pack(instruction())
    with pytest.raises(ValueError, match=packed.root):
        messages.verify(packed.root, packed.deflate(packed.root) + b"x")


scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.binary(max_size=20),
)
numbers = st.one_of(st.integers(-(2**62), 2**62), st.floats(allow_nan=False))
names = st.text(min_size=1, max_size=8)
flats = arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8]),
    array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


@settings(max_examples=60, deadline=None)
@given(
    flat=st.dictionaries(names, flats, max_size=3),
    config=st.dictionaries(names, scalars, max_size=4),
    metrics=st.dictionaries(names, numbers, max_size=4),
)
def test_what_is_packed_comes_back_equal(flat, config, metrics):
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(value) for name, value in flat.items()}),
            "config": ConfigRecord(config),
            "metrics": MetricRecord(metrics),
        }
    )
    message = instruction(content)
    packed = messages.pack(message)
    back = messages.unpack(packed.root, contents_of(packed))
    assert back.metadata == message.metadata
    assert dict(back.content["config"]) == config
    assert dict(back.content["metrics"]) == metrics
    for name, value in flat.items():
        received = back.content["arrays"][name].numpy()
        assert received.dtype == value.dtype
        np.testing.assert_array_equal(received, value)
    assert messages.pack(back).root == packed.root


def test_the_message_id_is_the_id_of_the_message_that_was_sent():
    message = instruction()
    packed = messages.pack(message)
    assert message.metadata.message_id == packed.root
    received = messages.unpack(packed.root, contents_of(packed))
    reply = Message(sample(), reply_to=received)
    assert reply.metadata.reply_to_message_id == packed.root


def test_sender_and_run_are_part_of_what_the_id_stands_for():
    message = instruction()
    assert (message.metadata.run_id, message.metadata.src_node_id) == (
        7,
        messages.SUPERLINK_NODE_ID,
    )
    before = messages.pack(message).root
    messages.stamp(message, run_id=8)
    assert messages.pack(message).root != before


def test_a_large_array_travels_in_chunks_and_equal_chunks_once():
    floats = 3 * FLOWER_CHUNK // 4
    packed = messages.pack(instruction(sample(np.zeros(floats, np.float32))))
    kinds = [type(part).__name__ for part in packed.objects.values()]
    assert kinds.count("ArrayChunk") == 3  # the first with the header, the zeros, the rest
    back = messages.unpack(packed.root, contents_of(packed))
    np.testing.assert_array_equal(back.content["arrays"]["flat"].numpy(), np.zeros(floats))


@pytest.mark.parametrize("floats", [0, 5, FLOWER_CHUNK // 2])
def test_an_array_is_cut_into_chunks_as_flower_cuts_it(floats):
    values = np.arange(floats, dtype=np.float32)
    ours, flowers = Array(values), Array(values)
    packed = messages.pack(instruction(RecordDict({"arrays": ArrayRecord({"flat": ours})})))
    [sent] = [part for part in packed.objects.values() if isinstance(part, Array)]
    assert sent.slice_array() == flowers.slice_array()
    assert sent.object_id == flowers.object_id
    for object_id, chunk in flowers.slice_array():
        assert packed.deflate(object_id) == chunk.deflate()


def test_a_changed_array_gets_a_new_id():
    content = sample()
    before = messages.pack(instruction(content)).root
    content["arrays"]["flat"] = Array(np.float32([3, 4]))
    middle = messages.pack(instruction(content))
    content["arrays"]["flat"].data = content["arrays"]["flat"].data[:-1] + b"x"
    after = messages.pack(instruction(content))
    assert len({before, middle.root, after.root}) == 3
    assert len(set(middle.objects) & set(after.objects)) == 1  # the config


def test_a_broadcast_is_hashed_once_for_all_its_receivers(monkeypatch):
    hashed = []

    def counting(content):
        hashed.append(len(content))
        return hashlib.sha256(content).hexdigest()

    monkeypatch.setattr(inflatable_object, "get_object_id", counting)
    monkeypatch.setattr(messages, "get_object_id", counting)
    content = sample(np.arange(50_000, dtype=np.float32))
    for node in range(1, 6):
        messages.pack(instruction(content, node))
    assert sum(size > 100_000 for size in hashed) == 1


def test_messages_that_share_an_array_share_nothing_that_can_change():
    content, known = sample(), {}
    first, second = (messages.pack(instruction(content, node)) for node in (1, 2))
    one = messages.unpack(first.root, contents_of(first), arrays=known)
    assert len(known) == 1
    two = messages.unpack(second.root, contents_of(second), arrays=known)
    one.content["arrays"]["flat"].numpy()[:] = 9
    one.content["arrays"]["flat"].data = b"scribble"
    del one.content["config"]
    np.testing.assert_array_equal(two.content["arrays"]["flat"].numpy(), [1, 2])
    three = messages.unpack(first.root, contents_of(first), arrays=known)
    np.testing.assert_array_equal(three.content["arrays"]["flat"].numpy(), [1, 2])


def test_a_missing_object_is_noticed():
    packed = messages.pack(instruction())
    contents = contents_of(packed)
    del contents[next(iter(contents))]
    with pytest.raises(KeyError):
        messages.unpack(packed.root, contents)


def test_an_object_that_is_no_message_is_noticed():
    packed = messages.pack(instruction())
    record = next(k for k, part in packed.objects.items() if isinstance(part, RecordDict))
    with pytest.raises(TypeError, match="RecordDict"):
        messages.unpack(record, contents_of(packed))


def test_an_error_reply_says_who_failed_and_at_what_and_nothing_more():
    message = instruction(node=3)
    messages.pack(message)
    reply = messages.error_reply(messages.outline(message), kind=messages.APP_RAISED, code="ST-401")
    packed = messages.pack(reply)
    back = messages.unpack(packed.root, contents_of(packed))
    assert back.error == Error(2, "ST-401")
    assert back.metadata.src_node_id == 3
    assert back.metadata.reply_to_message_id == message.metadata.message_id
    assert back.metadata.group_id == "4"


def test_a_fresh_copy_can_be_pickled_though_its_original_can_not():
    message = instruction()
    messages.pack(message)
    with pytest.raises(TypeError, match="memoryview"):
        pickle.dumps(message)
    copy = messages.fresh_copy(message)
    assert pickle.loads(pickle.dumps(copy)).content == copy.content
    assert copy.metadata == message.metadata


def test_a_process_that_is_no_server_yet_can_be_made_one():
    TaskIdentity._run_id = None
    with pytest.raises(RuntimeError, match="run_id"):
        instruction()
    messages.identify(5)
    assert Message(sample(), 1, "train").metadata.run_id == 5
    assert messages.new_run(5).run_id == 5


def test_flower_does_not_report_to_its_vendor(monkeypatch):
    from flwr.supercore import telemetry

    posted = []
    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setattr(telemetry.urllib.request, "urlopen", lambda *a, **k: posted.append(a))
    messages.disable_telemetry()
    sent = telemetry.event(telemetry.EventType.PYTHON_API_RUN_SIMULATION_ENTER).result(10)
    assert sent == "disabled"
    assert not posted
