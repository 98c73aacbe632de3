"""What the guard closes: each hole, tried over real TLS with a real site's keys."""

import socket
import ssl
import time

import httpx
import pytest
from flwr.app import Message, RecordDict

from silotune.flower.message_frames import MOST_HEAD, apart, outline_of, prefix
from silotune.protocol import http
from silotune.server import listener
from silotune.trust import identity
from silotune.trust.authority import Authority
from silotune.trust.identity import Subject
from tests.server.coordinator_material import scripted, small_plan, town
from tests.server.fleet_site import approve_all, wait_for

__all__ = ["town"]


@pytest.fixture
def pair(town):
    """Two active sites, and a run whose first messages wait for both."""
    alpha, beta = town.enrolled("alpha").activate(), town.enrolled("beta").activate()
    run = town.coordinator.run_control.propose(small_plan())
    approve_all(town.coordinator, run, [alpha, beta])
    return alpha, beta


def alarms(town, what):
    return [fields for fields in town.audit("alarm") if fields["what"] == what]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/list-nodes",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/health",
        "//v1/control/start-run",
        "/silotune/v1/link/../control/start-run",
        "/silotune/v1/link/%2e%2e/control/start-run",
        "/silotune/v1/../../v1/control/start-run",
        "/",
    ],
)
def test_flowers_apis_are_not_there_even_for_a_site(path, open_town, member):
    with member.http() as client:
        # A raw target, which httpx would normalise otherwise.
        request = client.build_request("POST", "/", content=b"")
        request.url = request.url.copy_with(raw_path=path.encode())
        response = client.send(request)
    assert response.status_code == 404
    assert response.json()["code"] == "ST-800"


@pytest.mark.parametrize("path", ["pull-messages", "activate-node", "register-node", "get-fab"])
def test_a_site_of_an_earlier_version_is_told_so(path, open_town, member):
    with member.http() as client:
        response = client.post(f"/v1/fleet/{path}")
    assert response.status_code == 426
    assert response.json()["code"] == "ST-761"


@pytest.fixture(scope="module")
def open_town(tmp_path_factory):
    from tests.server.coordinator_material import Town

    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def member(open_town):
    return open_town.enrolled("member").activate()


@pytest.mark.parametrize("path", sorted(http.SITE_PATHS | http.LINK_PATHS))
def test_without_a_certificate_only_the_way_in_is_open(path, open_town, member):
    with member.http(certificate=False) as client:
        assert client.post(path).status_code == 401
        assert client.get(http.AUTHORITY).status_code == 200


def test_a_certificate_of_another_authority_does_not_get_past_the_handshake(open_town, member):
    foreign = Authority.create("demo")
    real = member.certificate
    request = identity.make_request("member", member.node_key)
    subject = Subject(name="member", role="site")
    member.certificate = identity.chain_pem([foreign.issue_client(request, subject=subject)])
    try:
        with member.http() as client, pytest.raises(httpx.TransportError):
            client.get(http.PLANS)
    finally:
        member.certificate = real


def test_a_certificate_that_expired_does_not_get_past_the_handshake(open_town, member):
    authority = open_town.coordinator.keys.authority
    real = member.certificate
    request = identity.make_request("member", member.node_key)
    subject = Subject(name="member", role="site")
    expired = authority.issue_client(request, subject=subject, days=-0.001)
    member.certificate = identity.chain_pem([expired])
    try:
        with member.http() as client, pytest.raises(httpx.TransportError):
            client.get(http.PLANS)
    finally:
        member.certificate = real


@pytest.mark.parametrize(("name", "role"), [("nobody", "site"), ("member", "operator")])
def test_a_valid_certificate_of_no_active_site_is_refused(open_town, member, name, role):
    real, real_key = member.certificate, member.node_key
    member.node_key = identity.new_node_key()
    issued = open_town.coordinator.keys.authority.issue_client(
        identity.make_request(name, member.node_key), subject=Subject(name=name, role=role)
    )
    member.certificate = identity.chain_pem([issued])
    try:
        with member.http() as client:
            assert client.get(http.PLANS).status_code == 403
    finally:
        member.certificate, member.node_key = real, real_key


def test_older_tls_is_refused(open_town, member):
    context = ssl.create_default_context(cadata=member.authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.TransportError), httpx.Client(verify=context) as client:
        client.get(member.invite.url + http.AUTHORITY)


def test_bodies_are_bounded_whoever_sends_them(open_town, member):
    with member.http(certificate=False) as client:
        large = b"x" * (http.MOST_BYTES + 1)
        assert client.post(http.ENROL, content=large).status_code == 413
        assert client.post(http.ENROL, content=iter([b"x" * 1000] * 100)).status_code == 413
        assert client.post(http.ENROL, content=b"{}").status_code == 400
    with member.http() as client:
        client.headers[http.SESSION_HEADER] = member.session
        for path, size in ((http.PULL, 20_000), (http.PUSH, 7 << 20)):
            assert client.post(path, content=b"\0" * size).status_code == 413
        large = prefix(b"\0" * (MOST_HEAD + 1), number=0, of=0)
        wrong = (b"rubbish" * 9, large, prefix(b"", number=3, of=2), prefix(b"", number=0, of=999))
        for content in (b"", b"rubbish", *wrong, prefix(b"\xff" * 9, number=0, of=0)):
            assert client.post(http.PUSH, content=content).status_code == 400
        for content in (b"", b"{}", b'{"message": "../x", "number": 0}'):
            assert client.post(http.PIECE, content=content).status_code == 400
        for content in (b"", b"{}", b'{"seconds": -1.0, "sent_at": 0.0}'):
            assert client.post(http.HEARTBEAT, content=content).status_code == 400


def test_connections_without_a_certificate_are_few_and_short(open_town, member, monkeypatch):
    monkeypatch.setattr(listener, "MOST_ANONYMOUS", 3)
    monkeypatch.setattr(listener, "ANONYMOUS_SECONDS", 300.0)
    monkeypatch.setattr(listener, "_LAST_SECONDS", 0.2)
    context = member.context(certificate=False)
    address = ("127.0.0.1", open_town.coordinator.port)

    def connect(*, number):
        """One connection more; `number` are then counted, if it may stay."""
        made = context.wrap_socket(socket.create_connection(address), server_hostname="127.0.0.1")
        wait_for(lambda: listener.PeerProtocol._open[b""] == number)
        return made

    def closed(made, *, seconds=40.0):
        made.settimeout(seconds)
        try:
            return made.recv(1) == b""
        except TimeoutError:
            return False
        except (ConnectionError, ssl.SSLError):
            return True

    wait_for(lambda: listener.PeerProtocol._open[b""] == 0)  # earlier tests' are gone
    held = [connect(number=n) for n in (1, 2, 3)]
    assert closed(connect(number=3))  # the fourth is dropped
    held.pop().close()
    wait_for(lambda: listener.PeerProtocol._open[b""] == 2)
    monkeypatch.setattr(listener, "ANONYMOUS_SECONDS", 0.3)
    started = time.monotonic()
    short = context.wrap_socket(socket.create_connection(address), server_hostname="127.0.0.1")
    assert closed(short)  # when its time is over
    assert time.monotonic() - started >= 0.25
    wait_for(lambda: listener.PeerProtocol._open[b""] == 2)  # though its client keeps it
    assert not any(closed(each, seconds=0.1) for each in held)
    with member.http(certificate=False) as client:
        assert client.get(http.AUTHORITY).status_code == 200


def test_the_operators_own_connection_may_be_held_for_long(open_town, monkeypatch):
    monkeypatch.setattr(listener, "ANONYMOUS_SECONDS", 0.2)
    monkeypatch.setattr(listener, "MOST_ANONYMOUS", 0)
    with socket.socket(socket.AF_UNIX) as held:
        held.connect(str(open_town.home.socket_path))
        time.sleep(0.6)
        held.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
        held.settimeout(20.0)
        assert held.recv(64).startswith(b"HTTP/1.1 200")


def test_a_reply_to_what_another_site_was_asked_is_nobodys(town, pair):
    """Its sender is who holds the certificate, whatever it says of itself."""
    alpha, beta = pair
    message = alpha.get(wait_for(alpha.pull))
    forged = alpha.reply_to(message, scripted("alpha")(_Address("query.join"), None))
    assert forged.metadata.src_node_id == alpha.node
    assert not beta.send(forged)
    assert not town.coordinator.link.messages.is_answered(message.metadata.message_id)
    assert alpha.send(forged)


def test_a_piece_can_be_read_only_by_whom_it_is_addressed_to(town, pair):
    alpha, beta = pair
    frame = wait_for(alpha.pull)
    message_id = outline_of(frame.head).metadata.message_id
    assert frame.of == 1
    assert alpha.piece(message_id, 0) == bytes(frame.piece)
    assert beta.piece(message_id, 0) == b""
    assert alpha.piece(message_id, 1) == b""
    assert alpha.piece("0" * 64, 0) == b""


def test_a_reply_that_is_not_sealed_is_not_trusted_and_raises_an_alarm(town, pair):
    alpha, _ = pair
    message = alpha.get(wait_for(alpha.pull))
    assert alpha.send(Message(RecordDict(), reply_to=message))
    wait_for(lambda: alarms(town, "reply_not_trusted"))
    assert alarms(town, "reply_not_trusted")[0]["site"] == "alpha"


def test_the_pieces_of_a_reply_come_one_behind_the_other_or_again_from_the_first(town, pair):
    alpha, _ = pair
    message = alpha.get(wait_for(alpha.pull))
    reply = alpha.reply_to(message, scripted("alpha")(_Address("query.join"), None))
    head, pieces = apart(reply)
    (piece,) = pieces
    parts = (piece[:10], piece[10:20], piece[20:])
    sent = [prefix(head, number=n, of=3) + part for n, part in enumerate(parts)]
    alpha.call(http.PUSH, sent[0])
    with pytest.raises(httpx.HTTPStatusError) as caught:
        alpha.call(http.PUSH, sent[2])
    assert caught.value.response.status_code == 400
    for frame in (sent[0], sent[1], sent[0], sent[1]):
        assert alpha.call(http.PUSH, frame).json()["taken"]
    assert not town.coordinator.link.messages.is_answered(message.metadata.message_id)
    assert alpha.call(http.PUSH, sent[2]).json()["taken"]
    assert not alpha.call(http.PUSH, sent[2]).json()["taken"]  # it has been answered


@pytest.mark.parametrize("seconds", [-90.0, 90.0])
def test_a_site_whose_clock_is_wrong_does_not_come_in(town, seconds):
    alpha = town.enrolled("alpha")
    alpha.client = alpha.line()
    with pytest.raises(httpx.HTTPStatusError) as caught:
        alpha.call(http.ACTIVATE, alpha.alive(sent_at=time.time() + seconds))
    assert caught.value.response.status_code == 401


def test_the_newest_session_of_a_key_is_served_and_the_other_raises_an_alarm(town, pair):
    alpha, _ = pair
    old = alpha.client
    alpha.activate(session="e" * 32)
    with pytest.raises(httpx.HTTPStatusError) as caught:
        old.post(http.PULL).raise_for_status()
    assert caught.value.response.status_code == 409
    assert wait_for(alpha.pull)
    assert alarms(town, "second_session")[0]["site"] == "alpha"


def test_a_request_that_names_no_session_is_refused(town, pair):
    """Otherwise two processes that both leave it out would pass for one."""
    alpha, _ = pair
    headers = alpha.client.headers
    for session in (None, "", "e" * 31, "E" * 32):
        headers.pop(http.SESSION_HEADER, None)
        if session is not None:
            headers[http.SESSION_HEADER] = session
        with pytest.raises(httpx.HTTPStatusError) as caught:
            alpha.call(http.PULL)
        assert caught.value.response.status_code == 400
    assert alarms(town, "second_session") == []


def test_a_revoked_site_is_out_at_once_even_on_an_open_connection(town):
    alpha = town.enrolled("alpha").activate()
    with alpha.http() as client:
        assert client.get(http.PLANS).status_code == 200
        town.coordinator.registrar.revoke("alpha", reason="test")
        assert client.get(http.PLANS).status_code == 403
    with pytest.raises(httpx.HTTPStatusError) as caught:
        alpha.call(http.PULL)
    assert caught.value.response.status_code == 403


def test_a_waiting_site_is_answered_when_there_is_something_and_costs_nothing_before(town):
    alpha, beta = town.enrolled("alpha").activate(), town.enrolled("beta").activate()
    import threading

    answers = []
    waiter = threading.Thread(target=lambda: answers.append(alpha.pull()), daemon=True)
    waiter.start()
    time.sleep(0.5)
    assert not answers  # held
    started = time.monotonic()
    run = town.coordinator.run_control.propose(small_plan())
    approve_all(town.coordinator, run, [alpha, beta])
    waiter.join(timeout=15.0)
    assert answers[0] is not None
    assert time.monotonic() - started < 15.0


class _Address:
    def __init__(self, kind):
        self.kind, self.round = kind, 0
