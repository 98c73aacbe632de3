"""What the guard closes: each hole of the fleet API, tried over real TLS with a real site's keys."""

import socket
import ssl
import time

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

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
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-fab",
        "/v1/fleet/get-run",
        "/docs",
        "/openapi.json",
        "/health",
        "//v1/control/start-run",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/silotune/v1/../../v1/control/start-run",
        "/",
    ],
)
def test_flowers_other_apis_are_not_there_even_for_a_site(path, open_town, member):
    with member.http() as client:
        # A raw target, which httpx would normalise otherwise.
        request = client.build_request("POST", "/", content=b"")
        request.url = request.url.copy_with(raw_path=path.encode())
        response = client.send(request)
    assert response.status_code == 404
    assert response.json()["code"] == "ST-800"


@pytest.fixture(scope="module")
def open_town(tmp_path_factory):
    from tests.server.coordinator_material import Town

    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def member(open_town):
    return open_town.enrolled("member").activate()


@pytest.mark.parametrize("path", [*sorted(http.SITE_PATHS), "/v1/fleet/pull-messages"])
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
        for path, size in (("pull-messages", 20_000), ("push-object", 7 << 20)):
            response = client.post(f"/v1/fleet/{path}", content=b"\0" * size)
            assert response.status_code == 413
        assert client.post("/v1/fleet/push-messages", content=b"rubbish").status_code == 400


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


def test_a_reply_in_another_sites_name_is_refused_and_raises_an_alarm(town, pair):
    alpha, beta = pair
    outline, tree = wait_for(alpha.pull)
    message = alpha.get(outline, tree)
    forged = alpha.reply_to(message, scripted("alpha")(_Address("query.join"), None))
    beta_client = beta.client
    forged.metadata.__dict__["_message_id"] = "0" * 64
    request = fleet_pb2.PushMessagesRequest(node=beta.node)
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto

    request.messages_list.append(message_to_proto(remove_content_from_message(forged)))
    request.message_object_trees.append(tree)
    with pytest.raises(httpx.HTTPStatusError) as caught:
        beta_client.PushMessages(request)
    assert caught.value.response.status_code == 403
    assert alarms(town, "forged_request")[0]["site"] == "beta"


def test_objects_can_be_read_and_confirmed_only_by_whom_they_are_addressed_to(town, pair):
    alpha, beta = pair
    outline, tree = wait_for(alpha.pull)
    run_id = outline.metadata.run_id
    _, own_tree = wait_for(beta.pull)
    own = {part.object_id for part in iterate_object_tree(own_tree)}
    ids = [part.object_id for part in iterate_object_tree(tree)]
    private = [object_id for object_id in ids if object_id not in own]  # equal content is shared
    assert len(private) >= 2  # the message and its envelope, at least
    for object_id in private:
        assert not beta.read_object(run_id, object_id).object_found
    beta.confirm(run_id, tree.object_id)  # must change nothing
    assert all(alpha.read_object(run_id, object_id).object_found for object_id in ids)
    assert alpha.get(outline, tree).has_content()


def test_an_array_that_is_not_under_a_seal_is_refused_before_it_is_stored(town, pair):
    """Flower would put it together of as many chunks as it names, before any signature is looked at."""
    alpha, _ = pair
    message = alpha.get(*wait_for(alpha.pull))
    bare = RecordDict({"update": ArrayRecord({"flat": Array(np.zeros(3, np.float32))})})
    with pytest.raises(httpx.HTTPStatusError) as caught:
        alpha.send(Message(bare, reply_to=message))
    assert caught.value.response.status_code == 400


def test_an_object_that_belongs_to_no_reply_of_the_site_is_not_stored(town, pair):
    alpha, _ = pair
    request = message_pb2.PushObjectRequest(
        node=alpha.node, run_id=1, object_id="0" * 64, object_content=b"x", session_id=""
    )
    assert not alpha.client.PushObject(request).stored


@pytest.mark.parametrize("call", ["PullMessages", "SendNodeHeartbeat", "DeactivateNode"])
def test_another_sites_node_id_is_refused(town, pair, call):
    alpha, beta = pair
    other = node_pb2.Node(node_id=beta.node.node_id)
    requests = {
        "PullMessages": fleet_pb2.PullMessagesRequest(node=other),
        "SendNodeHeartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(
            node=other, heartbeat_interval=10.0
        ),
        "DeactivateNode": fleet_pb2.DeactivateNodeRequest(node_id=other.node_id),
    }
    with pytest.raises(httpx.HTTPStatusError) as caught:
        getattr(alpha.client, call)(requests[call])
    assert caught.value.response.status_code == 403


def test_a_node_key_must_be_the_certificates(town, pair):
    alpha, beta = pair
    public = identity.public_pem(beta.node_key.public_key()).encode()
    client = alpha.fleet(key=beta.node_key)  # beta's node key over alpha's certificate
    with pytest.raises(httpx.HTTPStatusError) as caught:
        client.ActivateNode(
            fleet_pb2.ActivateNodeRequest(public_key=public, heartbeat_interval=10.0)
        )
    assert caught.value.response.status_code == 403


def test_the_newest_session_of_a_key_is_served_and_the_other_raises_an_alarm(town, pair):
    alpha, _ = pair
    old = alpha.client
    alpha.activate(session="e" * 32)
    with pytest.raises(httpx.HTTPStatusError) as caught:
        old.PullMessages(fleet_pb2.PullMessagesRequest(node=alpha.node))
    assert caught.value.response.status_code == 409
    assert wait_for(alpha.pull)
    assert alarms(town, "second_session")[0]["site"] == "alpha"


def test_a_request_that_names_no_session_is_refused(town, pair):
    """Otherwise two processes that both leave it out would pass for one."""
    alpha, _ = pair
    headers = alpha.client._client.headers
    for session in (None, "", "e" * 31, "E" * 32):
        headers.pop(http.SESSION_HEADER, None)
        if session is not None:
            headers[http.SESSION_HEADER] = session
        with pytest.raises(httpx.HTTPStatusError) as caught:
            alpha.client.PullMessages(fleet_pb2.PullMessagesRequest(node=alpha.node))
        assert caught.value.response.status_code == 400
    assert alarms(town, "second_session") == []


def test_a_revoked_site_is_out_at_once_even_on_an_open_connection(town):
    alpha = town.enrolled("alpha").activate()
    with alpha.http() as client:
        assert client.get(http.PLANS).status_code == 200
        town.coordinator.registrar.revoke("alpha", reason="test")
        assert client.get(http.PLANS).status_code == 403
    with pytest.raises(httpx.HTTPStatusError) as caught:
        alpha.client.PullMessages(fleet_pb2.PullMessagesRequest(node=alpha.node))
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
