"""Objects as files: the answers that Flower's own store gives, sealed, and there after a crash."""

import stat
import threading

import pytest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.flower.objects import ObjectFiles
from silotune.trust.vault import Vault


def made(body, *children):
    """A content as Flower deflates it, and its tree."""
    ids = ",".join(tree.object_id for tree, _ in children)
    content = f"ConfigRecord {ids} {len(body)}".encode() + b"\0" + body
    tree = ObjectTree(object_id=get_object_id(content), children=[tree for tree, _ in children])
    return tree, content


LEAVES = [made(bytes([n])) for n in range(3)]
MIDDLE = [made(b"m", LEAVES[0], LEAVES[1]), made(b"n", LEAVES[1], LEAVES[2])]
ROOTS = [made(b"r", MIDDLE[0]), made(b"s", *MIDDLE), made(b"t", LEAVES[2]), made(b"u")]
ALL = [*LEAVES, *MIDDLE, *ROOTS]
CONTENTS = {tree.object_id: content for tree, content in ALL}


@pytest.fixture(scope="module")
def vault(tmp_path_factory):
    return Vault(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def store(tmp_path, vault):
    return ObjectFiles(tmp_path / "objects", vault)


def stored(store, root=ROOTS[1], run=7):
    """All of a message: announced, and its parts stored, children first."""
    tree, _ = root
    for object_id in store.preregister(run, tree):
        store.put(object_id, CONTENTS[object_id])


def answer(call, *arguments):
    """What a store answers, or the kind of its error."""
    try:
        found = call(*arguments)
    except (ValueError, NoObjectInStoreError) as exc:
        return type(exc).__name__
    return sorted(found) if isinstance(found, list) else found


OPERATIONS = st.one_of(
    st.tuples(st.just("preregister"), st.integers(1, 2), st.sampled_from([t for t, _ in ROOTS])),
    st.sampled_from([("put", key, content) for key, content in CONTENTS.items()]),
    st.tuples(st.just("delete"), st.sampled_from([t.object_id for t, _ in ALL])),
    st.tuples(st.just("delete_objects_in_run"), st.integers(1, 2)),
)


def shape(tree):
    return (tree.object_id, frozenset(map(shape, tree.children)))


def observed(store):
    """Everything that can be asked of a store."""
    known = {t.object_id: store.get(t.object_id) for t, _ in ALL}
    trees = {key: shape(store.get_object_tree(key)) for key in known if key in store}
    return len(store), known, trees


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    found = SqlObjectStore(str(tmp_path_factory.mktemp("flower") / "objects.sqlite"))
    found.initialize()
    return found


SEQUENCES = st.lists(OPERATIONS, max_size=12)


@settings(max_examples=150, deadline=None)
@given(operations=SEQUENCES)
def test_every_sequence_of_calls_is_answered_as_flowers_store_in_memory_answers_it(
    operations, vault, tmp_path_factory
):
    require_equal_answers(operations, InMemoryObjectStore(), vault, tmp_path_factory)


@settings(max_examples=25, deadline=None)  # each takes five times as long
@given(operations=SEQUENCES)
def test_every_sequence_of_calls_is_answered_as_flowers_tables_answer_it(
    operations, flowers, vault, tmp_path_factory
):
    flowers.clear()
    require_equal_answers(operations, flowers, vault, tmp_path_factory)


def require_equal_answers(operations, flowers, vault, tmp_path_factory):
    ours = ObjectFiles(tmp_path_factory.mktemp("ours") / "objects", vault)
    for name, *arguments in operations:
        expected = answer(getattr(flowers, name), *arguments)
        assert answer(getattr(ours, name), *arguments) == expected, name
        assert observed(ours) == observed(flowers)
    files = len(list(ours._folder.iterdir()))
    assert files == sum(bool(content) for content in observed(ours)[1].values())


def test_what_was_stored_is_there_in_the_next_process(store, vault):
    stored(store)
    next_one = ObjectFiles(store._folder, vault)
    assert observed(next_one) == observed(store)
    next_one.delete(ROOTS[1][0].object_id)
    assert (len(next_one), list(store._folder.iterdir())) == (0, [])


def test_what_was_only_announced_is_asked_for_again_in_the_next_process(store, vault):
    tree, _ = ROOTS[0]
    missing = store.preregister(7, tree)
    store.put(*next((t.object_id, c) for t, c in LEAVES if t.object_id in missing))
    next_one = ObjectFiles(store._folder, vault)
    assert tree.object_id not in next_one
    assert len(next_one.preregister(7, tree)) == len(missing) - 1
    next_one.delete_objects_in_run(7)
    assert list(store._folder.iterdir()) == []


def test_a_torn_file_takes_with_it_what_hangs_on_it_and_nothing_else(store, vault):
    stored(store)
    stored(store, ROOTS[3])
    torn = next(p for p in store._folder.iterdir() if p.name.endswith(LEAVES[0][0].object_id))
    torn.write_bytes(torn.read_bytes()[:-3])
    (store._folder / "7-half.tmp").write_bytes(b"left by a crash")
    (store._folder / "no number").write_bytes(b"")
    next_one = ObjectFiles(store._folder, vault)
    held = {t.object_id for t, _ in ALL if t.object_id in next_one}
    assert held == {t.object_id for t, _ in (LEAVES[1], LEAVES[2], MIDDLE[1], ROOTS[3])}
    assert len(list(store._folder.iterdir())) == len(held)


def test_what_belongs_to_no_message_is_removed_and_shared_parts_stay(store):
    stored(store, ROOTS[0])
    stored(store, ROOTS[1])
    stored(store, ROOTS[3])
    store.retain({ROOTS[0][0].object_id})
    held = {t.object_id for t, _ in ALL if t.object_id in store}
    assert held == {t.object_id for t, _ in (LEAVES[0], LEAVES[1], MIDDLE[0], ROOTS[0])}


def test_files_are_private_and_tell_nothing(store):
    secret = made(b"a weight of the update")
    store.preregister(7, secret[0])
    store.put(secret[0].object_id, secret[1])
    (path,) = store._folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"weight" not in path.read_bytes()
    assert store.get(secret[0].object_id) == secret[1]


@pytest.mark.parametrize(
    "name", ["../../x", "A" * 64, "0x" + "a" * 62, " " * 64, "a" * 63 + "\n", ""]
)
def test_a_name_that_is_no_hash_never_reaches_the_disk(store, name):
    with pytest.raises(ValueError, match="Invalid object ID"):
        store.preregister(7, ObjectTree(object_id=name))
    assert (len(store), list(store._folder.iterdir())) == (0, [])


def test_a_known_object_cant_be_given_other_children(store):
    stored(store)
    tree = ObjectTree(object_id=MIDDLE[0][0].object_id, children=[LEAVES[2][0]])
    with pytest.raises(ValueError, match="other children"):
        store.preregister(7, tree)


def test_threads_store_and_remove_messages_that_share_parts(store):
    failed = []

    def work(number):
        try:
            for turn in range(20):
                own = made(f"{number}.{turn}".encode(), MIDDLE[0])
                for object_id in store.preregister(number, own[0]):
                    store.put(object_id, CONTENTS.get(object_id, own[1]))
                assert store.get(own[0].object_id) == own[1]
                assert store.get(LEAVES[0][0].object_id) == LEAVES[0][1]
                store.delete(own[0].object_id)
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert (len(store), list(store._folder.iterdir())) == (0, [])
