"""Promise 2: a site runs only its own code. Here the coordinator is hostile, keys and all.

It holds the federation's signing key, the authority and the connection, and tries what it can. The
interpreter itself is watched: which files are opened, what is unpickled, which processes start.
"""

import io
import json
import pickle
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.proto.message_pb2 import Message as MessageProto

from silotune.flower.message_frames import MOST_HEAD, prefix
from silotune.protocol.envelope import refusal_code
from silotune.protocol.http import PULL
from tests.client.coordinator_double import CoordinatorDouble
from tests.client.site_rig import Rig

_WATCHED = {
    "open", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "pickle.find_class", "os.listdir", "os.scandir", "shutil.copyfile",
}  # fmt: skip
_events: list[tuple[str, str]] = []
_watching = threading.Event()


def _hook(event, args):
    if event in _WATCHED and _watching.is_set():
        _events.append((event, str(args[0]) if args else ""))


sys.addaudithook(_hook)


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return (open, (self.place, "w"))


@pytest.fixture(scope="module")
def rig(tmp_path_factory, bert_folder):
    folder = tmp_path_factory.mktemp("hostile")
    double = CoordinatorDouble(folder / "coordinator")
    with double, Rig(folder / "sites", bert_folder, double) as rig:
        rig.approve("r1")
        rig.marker = folder / "PWNED"
        # An honest round first: libraries, model and records are loaded by now.
        assert refusal_code(rig.ask("query.join")) is None
        assert refusal_code(rig.ask("train", 1)) is None
        yield rig


def header(shape):
    """A NumPy header alone."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape},), }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def signed(rig, kind="train", number=2, **options):
    return rig.sealed(kind, number, **options)[1]


def numpy_pickle(rig):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(rig.marker)], dtype=object), allow_pickle=True)
    return Array("object", (1,), "numpy.ndarray", buffer.getvalue())


def swapped(rig, content):
    """Change a signed message behind its signature."""
    other = rig.double.content("r1", rig.plan, server_round=2, **rig.records(), more=MetricRecord())
    forged = rig.double.sealed(other, address=rig.double.address("r1", "train", 2))
    forged["envelope"] = content["envelope"]
    return forged


def other(rig, **settings):
    return rig.plan.override({k.replace("__", "."): v for k, v in settings.items()})


STRANGER = Ed25519PrivateKey.generate()

# name -> (rig -> (content, message type, expected code))
HOSTILE = {
    "unsigned": lambda r: (r.double.content("r1", r.plan, server_round=2), "train", "ST-804"),
    "unsigned, with arrays": lambda r: (
        r.double.content("r1", r.plan, server_round=2, **r.records()), "train", "ST-804"),
    "signed by a stranger": lambda r: (signed(r, key=STRANGER), "train", "ST-804"),
    "changed after signing": lambda r: (swapped(r, signed(r)), "train", "ST-804"),
    "for another site": lambda r: (signed(r, address={"receiver": "beta"}), "train", "ST-804"),
    "from a site": lambda r: (signed(r, address={"sender": "beta"}), "train", "ST-804"),
    "of another federation": lambda r: (signed(r, address={"federation": "x"}), "train", "ST-804"),
    "signed as another type": lambda r: (signed(r, "evaluate"), "train", "ST-804"),
    "replayed into another round": lambda r: (signed(r, address={"round": 3}), "train", "ST-641"),
    "unknown type": lambda r: (signed(r, "train.shell"), "train.shell", "ST-641"),
    "unknown run": lambda r: (signed(r, run="nobody-proposed-it"), "train", "ST-642"),
    "run that is a path": lambda r: (signed(r, run="../../../../etc/passwd"), "train", "ST-642"),
    "run with a null byte": lambda r: (signed(r, run="r1\0x"), "train", "ST-642"),
    "changed plan": lambda r: (signed(r, plan=other(r, privacy__epsilon=7.9)), "train", "ST-516"),
    "plan with no noise": lambda r: (
        signed(r, plan=other(r, privacy__mode="none", privacy__epsilon=None, privacy__delta=None,
                             privacy__clip=None)), "train", "ST-516"),
    "plan that reads /etc": lambda r: (signed(r, plan=other(r, model__base="/etc")), "train", "ST-516"),
    "plan that is Python": lambda r: (
        r.double.sealed(
            RecordDict({"config": ConfigRecord({
                "plan": f"__import__('os').system('touch {r.marker}')", "run": "r1", "round": 2})}),
            address=r.double.address("r1", "train", 2)), "train", "ST-641"),
    "pickled array": lambda r: (
        signed(r, arrays=ArrayRecord({"flat": numpy_pickle(r)})), "train", "ST-000"),
    "pickle as configuration": lambda r: (
        signed(r, code=ConfigRecord({"x": pickle.dumps(Bomb(r.marker))}), number=1), "train", ""),
    "array of another length": lambda r: (
        signed(r, arrays=ArrayRecord({"flat": Array(np.zeros(7, np.float32))})), "train", "ST-651"),
    "array of NaN": lambda r: (
        signed(r, arrays=ArrayRecord({"flat": Array(
            np.full_like(r.records()["arrays"]["flat"].numpy(), np.nan))})), "train", "ST-651"),
    "array that lies of its shape": lambda r: (
        signed(r, arrays=ArrayRecord({"flat": Array(
            "float32", (2**31 - 1,), "numpy.ndarray", header(2**31 - 1))})), "train", "ST-000"),
    "no arrays": lambda r: (signed(r, arrays=MetricRecord({"x": 1.0})), "train", "ST-000"),
    "round beyond the plan": lambda r: (signed(r, number=6), "train", "ST-641"),
    "round below zero": lambda r: (signed(r, number=-1), "train", "ST-102"),
    "evaluation that the plan lacks": lambda r: (signed(r, "evaluate", 3), "evaluate", "ST-641"),
    "no configuration": lambda r: (
        r.double.sealed(RecordDict(r.records()), address=r.double.address("r1", "train", 2)),
        "train", "ST-641"),
    "plan of a megabyte": lambda r: (
        r.double.sealed(
            RecordDict({"config": ConfigRecord({"plan": "x" * (2 << 20), "run": "r1", "round": 2})}),
            address=r.double.address("r1", "train", 2)), "train", "ST-641"),
    "too large": lambda r: (
        signed(r, arrays=ArrayRecord({"flat": Array(np.zeros(2_000_000, np.float32))})),
        "train", "ST-641"),
}  # fmt: skip


def said(rig, reply):
    return reply.error.reason if reply.has_error() else refusal_code(rig.opened(reply))


def require_untouched(rig, before, marker):
    assert rig.ledger_rows() == before
    assert not marker.exists()
    foreign = [e for e in _events if e[0] != "open" and e[0] not in {"os.listdir", "os.scandir"}]
    assert foreign == []
    allowed = (str(rig.state.parent), str(rig.base), sys.prefix, sys.base_prefix, "/proc/self/",
               str(Path(__file__).parents[2]), "/etc/localtime", "/usr/share/zoneinfo")  # fmt: skip
    opened = {place for event, place in _events if event == "open" and place.startswith("/")}
    assert [place for place in opened if not place.startswith(allowed)] == []


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_does_nothing(rig, name):
    content, kind, code = HOSTILE[name](rig)
    before = rig.ledger_rows()
    _events.clear()
    _watching.set()
    try:
        reply = rig.double.exchange(content, kind)
    finally:
        _watching.clear()
    assert (said(rig, reply) or "") == code
    require_untouched(rig, before, rig.marker)
    if reply.has_content() and code:
        opened = rig.opened(reply)
        assert set(opened) == {"refusal"}
        assert set(opened["refusal"]) == {"code"}


def endless_pieces(head, pieces):
    """A gigabyte, by its first frame."""
    return prefix(head, number=0, of=256) + pieces[0]


def no_content(head, pieces):
    message = MessageProto.FromString(head)
    message.error.reason = "there is none"
    message.ClearField("content")
    return prefix(message.SerializeToString(), number=0, of=1) + pieces[0]


@pytest.mark.parametrize(
    ("tamper", "because"),
    [
        (endless_pieces, "more than"),
        (no_content, "something else than a message with content"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_message_is_refused_before_it_is_built(rig, tamper, because):
    before = rig.ledger_rows()
    _events.clear()
    _watching.set()
    try:
        reply = rig.double.exchange(signed(rig), "train", tamper=tamper)
    finally:
        _watching.clear()
    assert reply.error.reason == "ST-641"
    assert because in rig.refusals()[-1]["detail"]
    require_untouched(rig, before, rig.marker)


def test_the_watch_would_have_seen_it(tmp_path):
    _events.clear()
    _watching.set()
    try:
        pickle.loads(pickle.dumps(Bomb(tmp_path / "left behind"))).close()
    finally:
        _watching.clear()
    assert ("open", str(tmp_path / "left behind")) in _events
    assert any(event == "pickle.find_class" for event, _ in _events)


def html(path, body):
    return (200, b"<html>", {}) if path == PULL else None


def large_head(path, body):
    return (200, prefix(b"\0" * (MOST_HEAD + 1), number=0, of=0), {}) if path == PULL else None


def pickled(path, body):
    content = pickle.dumps(Bomb("/tmp/never"))
    return (200, prefix(content, number=0, of=0), {}) if path == PULL else None


def array_in_place_of_a_head(path, body):
    """Flower's form of an array, which may name one chunk a million times."""
    names = json.dumps({"arraychunk_ids": [0] * 10_000}).encode()
    content = f"Array {'ab' * 32} {len(names)}".encode() + b"\0" + names
    return (200, prefix(content, number=0, of=0), {}) if path == PULL else None


def endless(path, body):
    def write(handler):
        handler.send_response(200)
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        for _ in range(400):
            handler.wfile.write(b"20000\r\n" + b"\0" * 0x20000 + b"\r\n")

    return (200, write, {}) if path == PULL else None


def compressed(path, body):
    bomb = zlib.compress(b"\0" * 50_000_000)
    return (200, bomb, {"content-encoding": "deflate"}) if path == PULL else None


def redirected(path, body):
    if path == PULL:
        return 307, b"", {"location": "http://169.254.169.254/latest/meta-data"}
    return None


def server_error(path, body):
    return (500, b"no", {}) if path == PULL else None


@pytest.mark.parametrize(
    "hook",
    [
        html, large_head, pickled, array_in_place_of_a_head, endless, compressed, redirected,
        server_error,
    ],
    ids=lambda hook: hook.__name__,
)  # fmt: skip
def test_answers_that_are_none_make_the_site_wait_and_nothing_else(rig, hook):
    before = rig.ledger_rows()
    _events.clear()
    _watching.set()
    rig.double.hook = hook
    try:
        deadline = 200
        while rig.link.status.link != "waiting" and deadline:
            threading.Event().wait(0.1)
            deadline -= 1
        assert rig.link.status.link == "waiting"
    finally:
        rig.double.hook = None
        _watching.clear()
    require_untouched(rig, before, rig.marker)
    assert refusal_code(rig.ask("train", 1)) is None  # and then goes on as if nothing had been
    assert rig.ledger_rows() == before
