"""Messages under way: each is answered once, found again by the next process, and leaves no trace."""

import stat
import threading

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from sqlalchemy import event

from silotune.flower.link_messages import LinkMessages, Outgoing
from silotune.flower.message_frames import apart, frames, outline_of, prefix, read_frame
from silotune.flower.superlink import LinkState
from silotune.trust import identity
from silotune.trust.vault import Vault

LARGE = b"a weight of the update" * 4000


@pytest.fixture(scope="module")
def vault(tmp_path_factory):
    return Vault(tmp_path_factory.mktemp("keys"))


class Scene:
    """A link state with nodes and a run; `again` is the next process's."""

    def __init__(self, folder, vault, nodes=2):
        self.folder, self.vault = folder, vault
        self.link = LinkState(folder / "link.sqlite", vault=vault)
        keys = [identity.public_pem(identity.new_node_key().public_key()) for _ in range(nodes)]
        self.nodes = [self.link.register(key, f"n{n}") for n, key in enumerate(keys)]
        for node in self.nodes:
            assert self.link.activate(node, heartbeat=10.0)
        self.run = self.link.new_run()

    @property
    def messages(self):
        return self.link.messages

    def again(self):
        self.link = LinkState(self.folder / "link.sqlite", vault=self.vault)
        return self

    def ask(self, *nodes, blob=b"x", ttl=60.0):
        pieces = {f"bytes.{n}": ConfigRecord({"bytes": part}) for n, part in enumerate(parts(blob))}
        return self.link.push(
            self.run,
            [
                Outgoing(
                    node=node,
                    kind="train",
                    group="1.x",
                    ttl=ttl,
                    content=RecordDict({"config": ConfigRecord({"for": str(node)}), **pieces}),
                )
                for node in nodes
            ],
        )

    def fetch(self, node):
        """The instruction as a site builds it; None if there is none."""
        found = self.messages.first_frame(node)
        if found is None:
            return None
        frame = read_frame(b"".join(found))
        message_id = outline_of(frame.head).metadata.message_id
        others = [b"".join(self.messages.pieces(node, message_id, n)) for n in range(1, frame.of)]
        from silotune.flower.message_frames import Parts, together

        return together(Parts(frame.head, (bytes(frame.piece),)[: frame.of] + tuple(others)))

    def answer(self, node, message, blob=b"y"):
        """Send a reply in frames; whether each was taken."""
        pieces = {f"bytes.{n}": ConfigRecord({"bytes": part}) for n, part in enumerate(parts(blob))}
        reply = Message(RecordDict(pieces), reply_to=message)
        sent = [read_frame(b"".join(frame)) for frame in frames(apart(reply))]
        return [self.link.take(node, frame) for frame in sent]

    def replies(self):
        wanted = {one.message_id for one in self.messages.instructions(self.run)}
        return {
            asked: (node, b"".join(record["bytes"] for record in reply.content.values()))
            for asked, node, reply in self.messages.replies(self.run, wanted)
        }

    def files(self):
        return sorted((self.folder / "link.pieces").iterdir())

    def rows(self):
        tables = ("silotune_instructions", "silotune_replies")
        return [self.link._state.query(f"SELECT COUNT(*) AS n FROM {t}")[0]["n"] for t in tables]


def arrived(message):
    """What the pieces of a message hold."""
    named = (r["bytes"] for n, r in sorted(message.content.items()) if n.startswith("bytes."))
    return b"".join(named)


def parts(blob, size=50_000):
    return [blob[start : start + size] for start in range(0, max(len(blob), 1), size)]


@pytest.fixture
def scene(tmp_path, vault):
    return Scene(tmp_path, vault)


@pytest.mark.parametrize("blob", [b"", b"small", LARGE], ids=["empty", "small", "large"])
@pytest.mark.parametrize("restarts", [False, True], ids=["one process", "another each time"])
def test_an_instruction_is_asked_answered_read_and_forgotten_without_a_trace(scene, blob, restarts):
    next_one = scene.again if restarts else lambda: scene
    (node, _), (asked,) = scene.nodes, scene.ask(scene.nodes[0], blob=blob)
    message = next_one().fetch(node)
    assert message.metadata.message_id == asked
    assert arrived(message) == blob
    assert not next_one().messages.is_answered(asked)
    assert all(next_one().answer(node, message, blob + b"!"))
    assert next_one().messages.is_answered(asked)
    assert not scene.messages.waits_for(node)
    assert scene.fetch(node) is None
    assert next_one().replies() == {asked: (node, blob + b"!")}
    next_one().messages.forget([asked])
    assert (scene.rows(), scene.files(), scene.replies()) == ([0, 0], [], {})
    assert next_one().messages.instructions(scene.run) == []


def test_an_instruction_is_handed_out_until_it_is_answered(scene):
    node, other = scene.nodes
    scene.ask(node)
    first, again = (
        scene.fetch(node),
        scene.fetch(node),
    )  # the response was lost, or the site was killed
    assert first.metadata.message_id == again.metadata.message_id
    assert scene.fetch(other) is None
    assert scene.answer(node, first) == [True]
    assert scene.answer(node, first, b"another") == [False]  # at most once
    assert list(scene.replies().values()) == [(node, b"y")]


def test_the_oldest_comes_first(scene):
    node, _ = scene.nodes
    first, second = (*scene.ask(node), *scene.ask(node))
    message = scene.fetch(node)
    assert message.metadata.message_id == first
    scene.answer(node, message)
    assert scene.again().fetch(node).metadata.message_id == second


def test_nobody_answers_for_another_node_or_what_was_not_asked(scene):
    node, other = scene.nodes
    (asked,) = scene.ask(node)
    message = scene.fetch(node)
    assert scene.answer(other, message) == [False]
    assert scene.messages.pieces(node, asked, 0)
    assert scene.messages.pieces(other, asked, 0) == ()
    assert scene.messages.pieces(node, asked, 1) == ()
    scene.messages.forget([asked])
    assert scene.answer(node, message) == [False]
    assert scene.replies() == {}


def test_an_expired_instruction_is_neither_handed_out_nor_answered(scene):
    node, _ = scene.nodes
    scene.ask(node)
    message = scene.fetch(node)
    late = Scene.ask(scene, node, ttl=-1.0)
    assert [one.expired for one in scene.messages.instructions(scene.run)] == [False, True]
    scene.answer(node, message)
    assert scene.fetch(node) is None
    assert not scene.messages.waits_for(node)
    assert not scene.messages.is_answered(late[0])


def test_a_reply_that_was_cut_off_by_a_crash_is_sent_again_from_its_first_piece(scene):
    node, _ = scene.nodes
    scene.ask(node)
    message = scene.fetch(node)
    sent = [f"bytes.{n}" for n in range(len(parts(LARGE)))]
    assert len(sent) == 2
    reply = Message(
        RecordDict(
            {k: ConfigRecord({"bytes": p}) for k, p in zip(sent, parts(LARGE), strict=True)}
        ),
        reply_to=message,
    )
    head, pieces = apart(reply)
    first, last = (
        read_frame(prefix(head, number=n, of=2) + piece) for n, piece in enumerate(pieces)
    )
    assert scene.link.take(node, first)
    scene.again()
    assert scene.files() == []
    with pytest.raises(ValueError, match="before this one"):
        scene.link.take(node, last)
    assert scene.replies() == {}
    assert all(scene.answer(node, message, LARGE))
    assert list(scene.replies().values()) == [(node, LARGE)]


def test_a_reply_that_is_withdrawn_while_a_piece_of_it_is_written_leaves_nothing(
    scene, monkeypatch
):
    node, _ = scene.nodes
    (asked,) = scene.ask(node)
    message, files = scene.fetch(node), scene.messages._files
    write = files.write
    monkeypatch.setattr(
        files, "write", lambda name, piece: (write(name, piece), scene.messages.forget([asked]))
    )
    assert scene.answer(node, message, LARGE) == [False]
    assert (scene.files(), scene.rows()) == ([], [0, 0])


def test_what_all_are_asked_alike_is_stored_once_and_goes_with_the_last(scene):
    content = RecordDict({"bytes.0": ConfigRecord({"bytes": LARGE})})
    outgoing = [
        Outgoing(node=node, kind="train", group="1.x", ttl=60.0, content=content)
        for node in scene.nodes
    ]
    first, second = scene.link.push(scene.run, outgoing)
    assert len(scene.files()) == 1
    scene.messages.forget([first])
    assert scene.again().fetch(scene.nodes[1]).content["bytes.0"]["bytes"] == LARGE
    scene.messages.forget([second])
    assert scene.files() == []


@pytest.mark.parametrize("restarts", [False, True], ids=["one process", "another each time"])
def test_what_is_a_site_s_own_lies_beside_what_all_are_asked_and_crosses_in_one_frame(
    scene, restarts
):
    """A secure round: an adapter for all, and the shares that were sealed for one site alone."""
    next_one = scene.again if restarts else lambda: scene
    own = {node: f"shares for {node} ".encode() * 300 for node in scene.nodes}

    def content(node):
        pieces = enumerate((LARGE, own[node]))
        return RecordDict({f"bytes.{n}": ConfigRecord({"bytes": piece}) for n, piece in pieces})

    place = {"kind": "train.masked", "group": "1.x", "ttl": 60.0}
    asked = scene.link.push(
        scene.run, [Outgoing(node=node, content=content(node), **place) for node in scene.nodes]
    )
    sizes = sorted(path.stat().st_size for path in next_one().files())
    assert len(sizes) == 3
    assert sizes[1] < 10_000 < sizes[2]
    for node in scene.nodes:
        frame = read_frame(b"".join(next_one().messages.first_frame(node)))
        assert (frame.of, bytes(frame.piece)) == (1, LARGE + own[node])
        assert arrived(scene.fetch(node)) == LARGE + own[node]
    next_one().messages.forget(asked[:1])
    assert arrived(next_one().fetch(scene.nodes[1])) == LARGE + own[scene.nodes[1]]
    assert len(scene.files()) == 2
    next_one().messages.forget(asked[1:])
    assert scene.files() == []


@pytest.mark.parametrize("asked", [True, False], ids=["an instruction", "a reply"])
def test_a_torn_file_is_as_if_the_message_had_not_come(scene, asked):
    node, other = scene.nodes
    scene.ask(node, blob=LARGE if asked else b"x")
    scene.ask(other)
    if not asked:
        scene.answer(node, scene.fetch(node), LARGE)
    torn = scene.files()[0]
    torn.write_bytes(torn.read_bytes()[:-3])
    (scene.folder / "link.pieces" / "left by a crash").write_bytes(b"")
    scene.again()
    assert scene.files() == []
    assert scene.messages.waits_for(node) is not asked
    assert scene.messages.waits_for(other)
    assert scene.rows() == [2 - asked, 0]


def test_a_reply_whose_file_is_lost_while_it_waits_is_asked_for_again(scene, monkeypatch):
    monkeypatch.setattr("silotune.flower.link_messages._IN_MEMORY", 0)
    node, _ = scene.nodes
    scene.ask(node)
    scene.answer(node, scene.fetch(node), b"z" * 40_000)
    scene.ask(node, blob=LARGE)  # whose pieces take the other's place in memory
    for path in scene.files():
        if path.name.endswith(".0"):
            path.write_bytes(b"torn")
    assert scene.replies() == {}
    assert scene.messages.waits_for(node)
    scene.answer(node, scene.fetch(node), b"z" * 40_000)
    assert [blob for _, blob in scene.replies().values()] == [b"z" * 40_000]


def test_what_is_stored_is_private_and_tells_nothing(scene):
    node, _ = scene.nodes
    scene.ask(node, blob=LARGE)
    scene.answer(node, scene.fetch(node), b"a weight of the update")
    assert [stat.S_IMODE(path.stat().st_mode) for path in scene.files()] == [0o600] * 2
    everything = [*scene.files(), *scene.folder.glob("link.sqlite*")]
    assert not any(b"weight" in path.read_bytes() for path in everything)


def test_a_run_that_is_finished_leaves_nothing_and_other_runs_stay(scene):
    (node, other), done = scene.nodes, scene.run
    scene.ask(node, blob=LARGE)
    scene.run = scene.link.new_run()
    (kept,) = scene.ask(other)
    scene.link.finish_run(done)
    assert [one.message_id for one in scene.messages.instructions(scene.run)] == [kept]
    assert (scene.rows(), scene.files()) == ([1, 0], [])


@pytest.mark.parametrize("sites", [2, 40])
def test_an_exchange_costs_two_statements_a_site_and_a_transaction_a_reply(tmp_path, vault, sites):
    """And none of Flower's database, however many sites there are."""
    scene = Scene(tmp_path, vault, nodes=sites)
    asked, flowers = list[str](), list[str]()
    scene.messages._connection.set_trace_callback(asked.append)
    engine = scene.link._state._engine
    event.listen(
        engine, "before_cursor_execute", lambda c, r, statement, *_: flowers.append(statement)
    )
    ids = scene.ask(*scene.nodes)
    for node in scene.nodes:
        assert scene.messages.waits_for(node)
        assert scene.answer(node, scene.fetch(node)) == [True]
    assert len(scene.replies()) == sites
    scene.messages.forget(ids)
    words = [statement.split()[0] for statement in asked]
    deletes = {s for s in asked if s.startswith("DELETE FROM silotune_instructions")}
    assert words.count("COMMIT") == sites + 2
    assert words.count("INSERT") == 2 * sites
    assert len(deletes) == sites
    assert len(flowers) == 1  # who was ever there


def test_threads_that_ask_answer_read_and_forget_do_not_meet(tmp_path, vault):
    scene, failed = Scene(tmp_path, vault, nodes=4), []

    def work(node, number):
        try:
            for turn in range(15):
                blob = f"{number}.{turn}".encode() * (20_000 if turn % 5 == 0 else 1)
                (asked,) = scene.ask(node, blob=blob)
                assert all(scene.answer(node, scene.fetch(node), blob))
                assert scene.replies()[asked] == (node, blob)
                scene.messages.forget([asked])
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=work, args=(n, k)) for k, n in enumerate(scene.nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert (scene.rows(), scene.files()) == ([0, 0], [])


def test_a_transaction_that_fails_changes_nothing(tmp_path, vault):
    scene = Scene(tmp_path, vault)
    messages = scene.messages
    assert isinstance(messages, LinkMessages)
    messages._connection.execute("CREATE TRIGGER no BEFORE INSERT ON silotune_replies "
                                 "BEGIN SELECT RAISE(ABORT, 'full'); END")  # fmt: skip
    node, _ = scene.nodes
    scene.ask(node)
    message = scene.fetch(node)
    with pytest.raises(Exception, match="full"):
        scene.answer(node, message)
    assert scene.messages.waits_for(node)
    messages._connection.execute("DROP TRIGGER no")
    assert scene.answer(node, message) == [True]
