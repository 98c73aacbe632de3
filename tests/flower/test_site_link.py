"""The site's line: what its requests are, what each answer means, and what a bad network does to it."""

import contextlib
import http.server
import itertools
import socket
import statistics
import threading
import time

import pytest
from flwr.app import ConfigRecord, Message

from silotune.flower.message_frames import prefix
from silotune.flower.site_link import HEARTBEAT_SECONDS, Fleet
from silotune.protocol import http as wire
from silotune.protocol.envelope import refusal_code, unseal
from silotune.protocol.errors import (
    ClockWrong,
    CoordinatorRefused,
    CoordinatorUnavailable,
    MessageRefused,
    SessionTaken,
    VersionsDiffer,
)
from silotune.protocol.http import SESSION_HEADER
from silotune.protocol.https import KEPT_SECONDS, https_client, proxy_for
from silotune.server import listener
from silotune.trust.errors import RequestDeclined
from tests.client.coordinator_double import NODE, CoordinatorDouble
from tests.client.site_rig import Rig


@pytest.fixture(scope="module")
def rig(tmp_path_factory, bert_folder):
    folder = tmp_path_factory.mktemp("fleet")
    with CoordinatorDouble(folder / "coordinator") as double:
        yield Rig(folder / "sites", bert_folder, double)


@pytest.fixture
def fleet(rig):
    fleet = Fleet(rig.double.url, tls=rig.enrolment.tls(), session="5" * 32)
    yield fleet
    rig.double.hook = None
    fleet.close()


def test_a_session_is_named_in_every_request_and_its_node_is_known(rig, fleet):
    seen = []
    serve = rig.double._serve

    def watching(handler, body):
        seen.append((handler.path, handler.headers.get(SESSION_HEADER)))
        serve(handler, body)

    rig.double._serve = watching
    fleet.connect()
    assert fleet.node_id == NODE
    assert fleet.receive() is None
    rig.double._serve = serve
    assert {session for _, session in seen} == {"5" * 32}
    assert [path for path, _ in seen] == [wire.ACTIVATE, wire.PULL]


def answering(status, content=b"{}", **headers):
    return lambda path, body: (status, content, headers)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (answering(401), CoordinatorRefused),
        (answering(403, b'{"code": "ST-802", "detail": "revoked"}'), CoordinatorRefused),
        (answering(404, b'{"code": "ST-800", "detail": "no such path"}'), VersionsDiffer),
        (answering(409), SessionTaken),
        (answering(500), CoordinatorUnavailable),
        (answering(412, b'{"code": 1, "detail": "versions differ"}'), RequestDeclined),
        (answering(200, b"\xff\xff no frame"), CoordinatorUnavailable),
        (answering(401, date="Mon, 01 Jan 2024 00:00:00 GMT"), ClockWrong),
    ],
)
def test_each_refusal_means_one_thing(rig, fleet, answer, error):
    fleet.connect()
    rig.double.hook = answer
    with pytest.raises(error):
        fleet.receive()


@pytest.mark.parametrize("size", [0, 10, 3 * (4 << 20) + 5])
def test_an_exchange_is_a_request_for_each_piece(rig, fleet, size):
    """Of Flower's own protocol it would be eleven for the smallest."""
    asked = []
    serve = rig.double._serve

    def watching(handler, body):
        asked.append(handler.path)
        serve(handler, body)

    fleet.connect()
    pieces = -(-size // (4 << 20)) or 1
    content = rig.double.content("r", rig.plan, blob=ConfigRecord({"bytes": b"x" * size}))
    place = rig.double.address("r", "train", 1)
    rig.double._serve = watching
    try:
        rig.double.send(rig.double.message(rig.double.sealed(content, address=place), "train"))
        message = fleet.fetch(fleet.receive(), limit=1 << 30)
        assert unseal(message.content, address=place, key=rig.double.key.public_key()) == content
        assert fleet.send(Message(message.content, reply_to=message))
    finally:
        rig.double._serve = serve
    assert len(asked) == 2 * pieces
    assert rig.double.replies[-1].content == message.content


def test_a_message_of_which_a_piece_is_missing_is_refused(rig, fleet):
    fleet.connect()
    sealed = rig.double.sealed(
        rig.double.content("r", rig.plan), address=rig.double.address("r", "train", 1)
    )
    rig.double.send(
        rig.double.message(sealed, "train"),
        tamper=lambda head, pieces: prefix(head, number=0, of=2) + pieces[0],
    )
    with pytest.raises(MessageRefused, match="is not there"):
        fleet.fetch(fleet.receive(), limit=1 << 30)


def test_a_message_that_is_larger_than_it_may_be_is_refused(rig, fleet):
    fleet.connect()
    content = rig.double.content("r", rig.plan, blob=ConfigRecord({"bytes": b"x" * 5000}))
    sealed = rig.double.sealed(content, address=rig.double.address("r", "train", 1))
    for of in (1, 200):
        rig.double.send(
            rig.double.message(sealed, "train"),
            tamper=lambda head, pieces, of=of: prefix(head, number=0, of=of) + pieces[0],
        )
        with pytest.raises(MessageRefused, match="more than 4000 bytes"):
            fleet.fetch(fleet.receive(), limit=4000)


def test_heartbeats_go_on_while_python_is_busy(rig):
    """The interpreter's lock is held by pure Python all the time, as by the worst of trainings."""
    fleet = Fleet(rig.double.url, tls=rig.enrolment.tls(), session="6" * 32, heartbeat=0.25)
    fleet.connect()
    before, ends = len(rig.double.heartbeats), time.monotonic() + 60.0
    numbers = 0
    while len(rig.double.heartbeats) - before < 8 and time.monotonic() < ends:
        numbers += sum(i * i for i in range(2000))
    fleet.close()
    beats = rig.double.heartbeats[before:]
    assert numbers
    assert len(beats) >= 8
    # 0.8 of the interval apart; on a loaded machine one or another comes late.
    assert statistics.median(b - a for a, b in itertools.pairwise(beats)) < 2 * 0.25


def test_an_empty_answer_is_no_message(rig, fleet):
    fleet.connect()
    rig.double.hook = lambda path, body: (200, b"", {})
    assert fleet.receive() is None


def test_the_proxy_of_the_environment_is_used(rig, monkeypatch):
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            asked.append(self.path)
            self.send_error(403, "not through me")

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        monkeypatch.setenv("HTTPS_PROXY", place)
        monkeypatch.setenv("NO_PROXY", "")
        assert proxy_for(rig.double.url) == place
        client = https_client(rig.double.url, tls=rig.enrolment.tls())
        with pytest.raises(Exception, match="403"):
            client.get(rig.double.url)
        assert asked == [rig.double.url.removeprefix("https://")]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert proxy_for(rig.double.url) is None
    finally:
        server.shutdown()
        server.server_close()


def test_a_silent_connection_outlives_the_pause_between_heartbeats_but_not_the_servers_patience():
    """Else each heartbeat costs a handshake, or now and then meets a connection that is being closed."""
    assert (
        HEARTBEAT_SECONDS < KEPT_SECONDS < listener._KEPT_SECONDS < 60.0
    )  # proxies cut at a minute


def test_requests_share_a_connection(rig, fleet):
    made = []
    get_request = rig.double.server.get_request
    rig.double.server.get_request = lambda: made.append(1) or get_request()
    try:
        fleet.connect()
        for _ in range(3):
            fleet._said(wire.HEARTBEAT, fleet._alive(), wire.Done)
        assert len(made) == 1
    finally:
        rig.double.server.get_request = get_request


def test_a_session_goes_through_a_proxy_that_relays_it(rig, monkeypatch):
    """CONNECT, and then TLS end to end: the proxy sees nothing but the name and the bytes."""
    relayed = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            host, _, port = self.path.rpartition(":")
            with socket.create_connection((host, int(port))) as there:
                self.send_response(200)
                self.end_headers()
                back = threading.Thread(target=copy, args=(there, self.connection), daemon=True)
                back.start()
                copy(self.connection, there)
                back.join()

        def log_message(self, *args):
            pass

    def copy(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                relayed.append(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("NO_PROXY", "")
        fleet = Fleet(rig.double.url, tls=rig.enrolment.tls(), session="6" * 32)
        fleet.connect()
        assert fleet.node_id == NODE
        assert fleet.receive() is None
        fleet.close()
        seen = b"".join(relayed)
        assert len(seen) > 1000
        assert b"activate" not in seen
    finally:
        server.shutdown()
        server.server_close()


def test_a_failed_delivery_is_answered_from_the_cache_later(tmp_path, bert_folder):
    """The connection breaks while the answer is pushed: nothing is trained or charged again."""
    double = CoordinatorDouble(tmp_path / "coordinator")
    with double, Rig(tmp_path / "sites", bert_folder, double) as rig:
        rig.approve()
        rig.ask("query.join")
        activations = len(double.activations)
        double.hook = lambda path, body: (500, b"", {}) if path == wire.PUSH else None
        _, content = rig.sealed("train", 1)
        double.send(double.message(content, "train"))
        ends = time.monotonic() + 60
        while rig.link.status.link != "waiting" and time.monotonic() < ends:
            time.sleep(0.05)
        assert rig.link.status.link == "waiting"
        double.hook = None
        charged = [row for row in rig.ledger_rows() if row.entry.kind == "charge"]
        assert len(charged) == 1
        assert refusal_code(rig.ask("train", 1)) is None
        assert len(double.activations) > activations  # so that it is asked again
        assert [row for row in rig.ledger_rows() if row.entry.kind == "charge"] == charged
